(() => {
  const shown = value => value === null ? "not finite" : Math.abs(value) >= 1e4 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(4));
  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) { const middle = (low + high) >> 1; if (steps[middle] < step) low = middle; else high = middle; }
    return step - steps[low] < steps[high] - step ? low : high;
  };
  const make = (name, parent, text) => {
    const one = document.createElement(name);
    if (text !== undefined) one.textContent = text;
    return parent.appendChild(one);
  };
  for (const chart of document.querySelectorAll(".chart")) {
    const lines = JSON.parse(chart.dataset.lines), first = +chart.dataset.low, last = +chart.dataset.high;
    for (const plot of chart.querySelectorAll(".plot")) {
      const area = plot.querySelector(".area"), low = +plot.dataset.low, high = +plot.dataset.high;
      const up = value => plot.dataset.log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
      let parts = [];
      const clear = () => { for (const part of parts) part.remove(); parts = []; };
      const show = event => {
        clear();
        const place = area.getBoundingClientRect(), share = (event.clientX - place.left) / place.width;
        if (share < -.02 || share > 1.02) return;
        const step = first + share * (last - first), read = document.createElement("div");
        let at = null;
        for (const line of lines) {
          const i = nearest(line.x, step);
          if (at === null || Math.abs(line.x[i] - step) < Math.abs(at - step)) at = line.x[i];
        }
        read.className = "read";
        make("b", read, "step " + at.toLocaleString("en"));
        for (const line of lines) {
          const mean = plot.dataset.log ? line.logMean : line.mean, i = nearest(line.x, at), value = line.y[i], row = make("div", read);
          if (Math.abs(line.x[i] - at) > .04 * (last - first)) { row.remove(); continue; }
          make("i", row).className = "c" + line.colour;
          make("span", row, (lines.length > 1 ? line.name + "  " : "") + shown(value));
          if (mean && mean[i] !== null) make("span", row, "  mean " + shown(mean[i])).className = "soft";
          if (line.x[i] !== at) make("span", row, "  at " + line.x[i].toLocaleString("en")).className = "soft";
          const drawn = mean ? mean[i] : value;
          if (drawn === null || !isFinite(up(drawn))) continue;
          const dot = make("i", area);
          dot.className = "dot c" + line.colour;
          dot.style.left = 100 * (line.x[i] - first) / (last - first) + "%";
          dot.style.bottom = 100 * up(drawn) + "%";
          parts.push(dot);
        }
        const hair = make("div", area);
        hair.className = "hair";
        hair.style.left = 100 * (at - first) / (last - first) + "%";
        area.append(read);
        parts.push(hair, read);
        const left = share * place.width, room = read.offsetWidth + 14;
        read.style.left = Math.max(-30, left + room < place.width ? left + 14 : left - room) + "px";
      };
      area.addEventListener("pointermove", show);
      area.addEventListener("pointerdown", show);
      area.addEventListener("pointerleave", clear);
    }
  }
})();
