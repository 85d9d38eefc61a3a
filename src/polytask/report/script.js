"use strict";
document.documentElement.classList.add("live");

// charts: a reading line at the epoch under the pointer, with every line's value
const readout = document.createElement("div");
readout.id = "readout";
readout.hidden = true;
document.body.append(readout);

for (const chart of document.querySelectorAll("svg[data-chart]")) {
  const data = JSON.parse(chart.dataset.chart);
  const cursor = chart.querySelector(".cursor");
  const first = data.x[0], span = data.x[data.x.length - 1] - first || 1;
  const place = (x) => data.left + ((x - first) / span) * (data.right - data.left);
  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
    let nearest = 0;
    data.x.forEach((x, i) => { if (Math.abs(place(x) - at) < Math.abs(place(data.x[nearest]) - at)) nearest = i; });
    cursor.setAttribute("x1", place(data.x[nearest]));
    cursor.setAttribute("x2", place(data.x[nearest]));
    cursor.style.visibility = "visible";
    readout.replaceChildren(row(`epoch ${data.x[nearest]}`));
    for (const line of data.lines) if (line.y[nearest] !== null) readout.append(row(`${line.name}: ${line.y[nearest].toLocaleString("en-US", { maximumSignificantDigits: 4 })}${data.unit}`));
    readout.hidden = false;
    const left = event.clientX + 16 + readout.offsetWidth > innerWidth ? event.clientX - 16 - readout.offsetWidth : event.clientX + 16;
    readout.style.left = `${Math.max(4, left)}px`;
    readout.style.top = `${Math.min(event.clientY + 12, innerHeight - readout.offsetHeight - 8)}px`;
  });
  chart.addEventListener("pointerleave", () => { readout.hidden = true; cursor.style.visibility = "hidden"; });
}

function row(text) {
  const line = document.createElement("div");
  line.textContent = text;
  return line;
}

// heat-maps: the slider and the small maps choose the epoch of the large one
for (const figure of document.querySelectorAll(".heat")) {
  const { epochs, limit, frames } = JSON.parse(figure.querySelector(".frames").textContent);
  const slider = figure.querySelector(".epoch-slider");
  const buttons = figure.querySelectorAll("button[data-step]");
  const show = (step) => {
    for (const cell of figure.querySelectorAll("[data-cell]")) {
      const [i, j] = cell.dataset.cell.split(",").map(Number);
      const value = frames[step][i][j];
      const rect = cell.querySelector("rect");
      rect.setAttribute("class", value === null ? "unknown" : value >= 0 ? "agree" : "oppose");
      rect.setAttribute("fill-opacity", value === null ? 0.15 : Math.min(1, Math.abs(value) / limit));
      cell.querySelector("text").textContent = value === null ? "–" : value.toFixed(2).replace("-", "−");
    }
    if (!slider) return;
    slider.value = step;
    figure.querySelector("output").textContent = epochs[step];
    slider.setAttribute("aria-valuetext", `epoch ${epochs[step]}`);
    for (const button of buttons) button.setAttribute("aria-pressed", String(Number(button.dataset.step) === step));
  };
  slider?.addEventListener("input", () => show(Number(slider.value)));
  for (const button of buttons) button.addEventListener("click", () => show(Number(button.dataset.step)));
  show(epochs.length - 1);
}

// paper cannot be unfolded
addEventListener("beforeprint", () => { for (const part of document.querySelectorAll("details")) part.open = true; });
