#!/bin/sh
# Everything that needs a GPU, in one go: the tests with the marker gpu, then every benchmark that takes --device cuda.
#
#     sh benchmarks/gpu.sh [FOLDER]      writes FOLDER/*.txt and FOLDER/*.md, by default benchmarks/results/gpu
#
# PYTHON chooses the interpreter (default python3). Goes on after a failure, and ends with a non-zero status if there was one.
PYTHON=${PYTHON:-python3}
cd "$(dirname "$0")/.." || exit 2
folder=${1:-benchmarks/results/gpu}
mkdir -p "$folder" || exit 2
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
status=0

run() { # run NAME COMMAND...: keeps the output and the status
    name=$1
    shift
    echo "== $name"
    "$@" >"$folder/$name" 2>"$folder/$name.stderr" || {
        status=1
        echo "failed, the end of $folder/$name.stderr:"
        tail -n 5 "$folder/$name.stderr"
    }
    tail -n 60 "$folder/$name"
}

"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.cuda.get_device_name())' || exit 2
run tests.txt "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider $(grep -rl mark.gpu tests)
for batch in 16 1; do
    run detectors_batch_$batch.md "$PYTHON" benchmarks/detectors.py --device cuda --size 800 1333 --precision bf16 --batch $batch
done
run deformable_detr_training.md "$PYTHON" benchmarks/deformable_detr.py --device cuda --batch 8 --train
run deformable_detr.md "$PYTHON" benchmarks/deformable_detr.py --device cuda --batch 8
run deformable_detr_batch_1.md "$PYTHON" benchmarks/deformable_detr.py --device cuda --batch 1
run roi_align.md "$PYTHON" benchmarks/roi_align.py --device cuda
run attention.md "$PYTHON" benchmarks/attention.py --device cuda
run attention_batch_8.md "$PYTHON" benchmarks/attention.py --device cuda --batch 8
run soft_nms.md "$PYTHON" benchmarks/soft_nms.py --device cuda
run cascade.md "$PYTHON" benchmarks/cascade.py --device cuda
exit $status
