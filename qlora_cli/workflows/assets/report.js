// Shows the values of a chart under the pointer, the finger, or by the arrow keys. The charts themselves are drawn.
"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const charts = JSON.parse(document.getElementById("values").textContent);

  const make = (parent, name, kind, text) => {
    const node = parent.namespaceURI === SVG ? document.createElementNS(SVG, name) : document.createElement(name);
    if (kind) node.setAttribute("class", kind);
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  };

  const written = (value) => {
    if (value === null) return "not finite";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    return size >= 1 ? value.toFixed(size >= 100 ? 1 : 4) : String(Number(value.toPrecision(4)));
  };

  // The place in the sorted `steps` that is nearest to `step`.
  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle; else high = middle;
    }
    return step - steps[low] <= steps[high] - step ? low : high;
  };

  const attach = (box) => {
    const chart = charts[box.dataset.chart];
    if (!chart) return;
    const plot = box.querySelector(".plot"), tip = box.querySelector(".tip");
    const [first, last] = chart.x, [bottom, top] = chart.y;
    const all = [...new Set(chart.lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
    let marks = null, place = -1;

    const hide = () => {
      if (marks) marks.remove();
      marks = null;
      place = -1;
      tip.hidden = true;
    };

    const show = (index) => {
      hide();
      place = index;
      const step = all[index], share = (step - first) / (last - first);
      marks = make(plot, "g");
      const rule = make(marks, "line", "rule");
      for (const [name, value] of [["x1", share], ["x2", share], ["y1", 0], ["y2", 1]]) rule.setAttribute(name, `${100 * value}%`);
      tip.replaceChildren();
      tip.style.left = "0px"; // or its width would be what was left of the box
      make(tip, "p", "at", `step ${step.toLocaleString("en")}`);
      for (const line of chart.lines) value(line, step);
      tip.hidden = false;
      const width = box.clientWidth, left = share * width;
      tip.style.left = `${left < width / 2 ? Math.min(left + 12, width - tip.offsetWidth) : Math.max(0, left - 12 - tip.offsetWidth)}px`;
    };

    // A line's value at the step; of a line that has none there, its nearest, with its own step, if that is near.
    const value = (line, step) => {
      const at = nearest(line.steps, step), own = line.steps[at], found = line.values[at];
      if (Math.abs(own - step) > (last - first) / 20) return;
      const row = make(tip, "p"), label = make(row, "span");
      make(label, "i", `key ${line.class}`);
      label.append(own === step ? line.name : `${line.name} (step ${own.toLocaleString("en")})`);
      make(row, "b", "", written(found));
      if (found === null) return;
      const dot = make(marks, "circle", `dot ${line.class}`);
      dot.setAttribute("r", "4.5");
      dot.setAttribute("cx", `${(100 * (own - first)) / (last - first)}%`);
      dot.setAttribute("cy", `${100 - (100 * (found - bottom)) / (top - bottom)}%`);
    };

    const under = (event) => {
      const room = box.getBoundingClientRect();
      show(nearest(all, first + ((event.clientX - room.left) / room.width) * (last - first)));
    };

    box.addEventListener("pointermove", under);
    box.addEventListener("pointerdown", under);
    box.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
    box.addEventListener("blur", hide);
    box.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") hide();
      if (!move) return;
      event.preventDefault();
      show(Math.min(all.length - 1, Math.max(0, place < 0 ? (move > 0 ? 0 : all.length - 1) : place + move)));
    });
  };

  document.querySelectorAll("[data-chart]").forEach(attach);
})();
