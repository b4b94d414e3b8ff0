document.querySelectorAll("table.sortable").forEach(table=>{
  table.querySelectorAll("thead th").forEach((head,column)=>{
    const button=head.querySelector("button");
    if(!button)return;
    button.addEventListener("click",()=>{
      const up=head.getAttribute("aria-sort")==="descending";
      table.querySelectorAll("th").forEach(other=>other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort",up?"ascending":"descending");
      const body=table.tBodies[0],rows=[...body.rows];
      const key=row=>row.cells[column].dataset.value??row.cells[column].textContent;
      rows.sort((a,b)=>{
        const x=key(a),y=key(b),m=parseFloat(x),n=parseFloat(y);
        if(x===""||y==="")return x===y?0:x===""?1:-1;
        const order=Number.isNaN(m)||Number.isNaN(n)?x.localeCompare(y):m-n;
        return up?order:-order;
      });
      rows.forEach(row=>body.append(row));
    });
  });
});
