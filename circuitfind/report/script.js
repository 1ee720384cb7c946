"use strict";

// Tables: a click on a header sorts by that column, numbers by value, text by alphabet; a second click turns round.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const header = button.parentElement;
    const body = header.closest("table").tBodies[0];
    const column = header.cellIndex;
    const down = header.getAttribute("aria-sort") !== "descending";
    const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const numeric = header.classList.contains("number");
    const compare = (a, b) => {
      if (!numeric) return value(a).localeCompare(value(b), "en", { numeric: true });
      const [x, y] = [parseFloat(value(a)), parseFloat(value(b))];
      return (Number.isNaN(x) ? -Infinity : x) - (Number.isNaN(y) ? -Infinity : y);
    };
    const rows = [...body.rows].sort((a, b) => (down ? compare(b, a) : compare(a, b)));
    for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...rows);
  });
}

// The drawing: a box under the pointer or the focus lights up its arrows; arrow keys walk from box to box.
const circuit = document.querySelector(".canvas svg.circuit");
if (circuit) {
  const said = document.getElementById("said");
  const idle = said.textContent;
  const boxes = [...circuit.querySelectorAll(".box")];
  const arrows = [...circuit.querySelectorAll("[data-from]")];
  const show = (box) => {
    const name = box.dataset.name;
    const near = new Set([name]);
    let into = 0;
    let out = 0;
    for (const arrow of arrows) {
      const touches = arrow.dataset.from === name || arrow.dataset.to === name;
      arrow.classList.toggle("lit", touches);
      if (!touches || arrow.classList.contains("hidden")) continue;
      near.add(arrow.dataset.from).add(arrow.dataset.to);
      if (!arrow.classList.contains("arrow")) continue;
      if (arrow.dataset.to === name) into += 1;
      else out += 1;
    }
    for (const other of boxes) other.classList.toggle("lit", near.has(other.dataset.name));
    circuit.classList.add("focused");
    said.textContent = `${name}: ${into} edges in, ${out} out`;
  };
  const rest = () => {
    circuit.classList.remove("focused");
    said.textContent = idle;
  };
  const centre = (box) => {
    const frame = box.getBoundingClientRect();
    return [frame.x + frame.width / 2, frame.y + frame.height / 2];
  };
  const walk = (box, key) => {
    const [x, y] = centre(box);
    const [dx, dy] = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[key];
    let best = null;
    let least = Infinity;
    for (const other of boxes) {
      const [ox, oy] = centre(other);
      const along = (ox - x) * dx + (oy - y) * dy;
      const aside = Math.abs((ox - x) * dy) + Math.abs((oy - y) * dx);
      const cost = along + 2 * aside;
      if (other !== box && along > 2 && cost < least) [best, least] = [other, cost];
    }
    if (best) {
      box.tabIndex = -1;
      best.tabIndex = 0;
      best.focus();
    }
  };
  if (boxes.length) boxes[0].tabIndex = 0;
  for (const box of boxes) {
    box.addEventListener("pointerenter", () => show(box));
    box.addEventListener("pointerleave", rest);
    box.addEventListener("focus", () => show(box));
    box.addEventListener("blur", rest);
    box.addEventListener("keydown", (event) => {
      if (!event.key.startsWith("Arrow")) return;
      event.preventDefault();
      walk(box, event.key);
    });
  }

  const slider = document.getElementById("strongest");
  slider?.addEventListener("input", () => {
    const most = Number(slider.value);
    const used = new Set();
    for (const arrow of arrows) {
      if (!arrow.classList.contains("arrow")) continue;
      const hidden = Number(arrow.dataset.rank) > most;
      arrow.classList.toggle("hidden", hidden);
      if (!hidden) used.add(arrow.dataset.from).add(arrow.dataset.to);
    }
    for (const stub of circuit.querySelectorAll(".stub")) {
      const seen = used.has(stub.dataset.from);
      stub.classList.toggle("hidden", !seen);
      if (seen) used.add(stub.dataset.to);
    }
    for (const box of boxes) box.classList.toggle("unused", !used.has(box.dataset.name));
    document.getElementById("shown").textContent = `${most} of ${slider.max}`;
  });
}
