(() => {
  "use strict";
  const tip = document.getElementById("tip");
  const hide = () => {
    tip.hidden = true;
    document.querySelectorAll("use.hot").forEach((mark) => mark.classList.remove("hot"));
  };
  document.querySelectorAll("svg.area").forEach((area) => {
    // Native titles serve pages without scripts; here they would be a second, slower tooltip.
    const marks = [...area.querySelectorAll(":scope > use")].filter((mark) => {
      const title = mark.querySelector("title");
      if (title) { mark.tipText = title.textContent; title.remove(); }
      return mark.tipText;
    });
    const order = [...marks].sort((a, b) => parseFloat(a.getAttribute("x")) - parseFloat(b.getAttribute("x")));
    let current = -1;
    const at = (mark, box) => [
      box.width * parseFloat(mark.getAttribute("x")) / 100,
      box.height * parseFloat(mark.getAttribute("y")) / 100,
    ];
    const show = (mark) => {
      hide();
      const box = area.getBoundingClientRect();
      const [x, y] = at(mark, box);
      mark.classList.add("hot");
      tip.textContent = mark.tipText;
      tip.hidden = false;
      const left = Math.min(box.left + x + 14, document.documentElement.clientWidth - tip.offsetWidth - 8);
      const above = box.top + y - tip.offsetHeight - 14;
      tip.style.left = Math.max(8, left) + "px";
      tip.style.top = (above > 8 ? above : box.top + y + 18) + "px";
    };
    area.addEventListener("pointermove", (event) => {
      const box = area.getBoundingClientRect();
      const px = event.clientX - box.left, py = event.clientY - box.top;
      const alongX = area.dataset.pick === "x";
      let best = null, least = alongX ? Infinity : 32 * 32;
      for (const mark of marks) {
        const [x, y] = at(mark, box);
        const distance = (x - px) ** 2 + (alongX ? 0 : (y - py) ** 2);
        if (distance < least) { least = distance; best = mark; }
      }
      if (best) { current = order.indexOf(best); show(best); } else hide();
    });
    area.addEventListener("pointerleave", hide);
    area.addEventListener("blur", hide);
    area.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Escape") hide();
      if (!step || !order.length) return;
      event.preventDefault();
      current = Math.max(0, Math.min(order.length - 1, current + step));
      show(order[current]);
    });
  });
  addEventListener("scroll", hide, { passive: true });
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
})();
