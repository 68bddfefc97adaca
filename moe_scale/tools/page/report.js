"use strict";
// Values under the pointer. Without this script the page shows all that it shows, but for these.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);

  const text = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace("e+", "e");
    return value.toLocaleString("en", { maximumSignificantDigits: 4 });
  };

  // The place of the number nearest to x in a rising list.
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle + 1; else high = middle;
    }
    return low > 0 && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
  };

  const follow = (element, show, hide) => {
    element.addEventListener("pointermove", show);
    element.addEventListener("pointerdown", show);
    element.addEventListener("pointerleave", hide);
  };

  for (const chart of document.querySelectorAll(".chart")) {
    const { lines, limits } = data[chart.dataset.key];
    const outputs = chart.querySelectorAll(".legend span > output");
    const last = Array.from(outputs, (output) => output.textContent);
    const stepOutput = chart.querySelector(".step");
    for (const picture of chart.querySelectorAll(".picture")) {
      const left = Number(picture.dataset.left), right = Number(picture.dataset.right);
      const cursor = picture.querySelector(".cursor");
      follow(picture, (event) => {
        const box = picture.getBoundingClientRect();
        const share = ((event.clientX - box.left) / box.width - left) / (right - left);
        const wanted = limits[0] + Math.min(1, Math.max(0, share)) * (limits[1] - limits[0]);
        const longest = lines.reduce((a, b) => (b.x.length > a.x.length ? b : a));
        const step = longest.x[nearest(longest.x, wanted)];
        lines.forEach((line, n) => {
          const at = nearest(line.x, step);
          const inside = step >= line.x[0] && step <= line.x[line.x.length - 1];
          outputs[n].textContent = inside ? text(line.y[at]) : "–";
        });
        stepOutput.textContent = "step " + step.toLocaleString("en");
        const place = left + ((step - limits[0]) / (limits[1] - limits[0])) * (right - left);
        cursor.style.left = place * 100 + "%";
        cursor.hidden = false;
      }, () => {
        cursor.hidden = true;
        stepOutput.textContent = "last";
        outputs.forEach((output, n) => { output.textContent = last[n]; });
      });
    }
  }

  for (const map of document.querySelectorAll(".map[data-key]")) {
    const { rows, steps, values } = data[map.dataset.key];
    const image = map.querySelector("img"), output = map.querySelector(".steps output");
    follow(image, (event) => {
      const box = image.getBoundingClientRect();
      const cell = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
      const column = cell((event.clientX - box.left) / box.width, steps.length);
      const row = cell((event.clientY - box.top) / box.height, rows.length);
      output.textContent = `step ${steps[column].toLocaleString("en")}, ${rows[row]}: ${text(values[column][row])}`;
    }, () => { output.textContent = ""; });
  }
})();
