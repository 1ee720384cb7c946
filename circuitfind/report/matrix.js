// The circuit as a table, for sizes that no graph can show: writers down, readers across, each layer's heads together.
// A cell's colour is the summed |effect| of its edges (square-root scale up to the 99th percentile; a cell beyond it has a
// dot). It is handled like a drawing (`Plate`): its cells are the boxes, named "a20 to a23".
const INKED = 0.99;

const groupOf = (name) => name.replace(/\..*$/, "");
const cellOf = (edge) => `${groupOf(edge.from)} to ${groupOf(edge.to)}`;
const isCell = (name) => Boolean(name?.includes(" to "));
const members = (cell) => edges.filter((edge) => cellOf(edge) === cell);
const total = (some) => some.reduce((sum, edge) => sum + strength(edge), 0);

const draw = (tag, attributes, ...children) => {
  const element = document.createElementNS(document.querySelector("svg.circuit").namespaceURI, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};

class Matrix {
  constructor(element, frame) {
    Object.assign(this, { element, frame, boxes: new Map(), last: Infinity });
    this.svg = draw("svg", { class: "circuit", role: "group", "aria-label": "Effects summed by layer" });
    element.replaceChildren(this.svg);
    const rank = (name) => (name === "input" ? -1 : name === "logits" ? Infinity : Number(name.slice(1)) + (name[0] === "m") / 2);
    const sides = ["from", "to"].map((end) => [...new Set(edges.map((edge) => groupOf(edge[end])))]);
    [this.rows, this.columns] = sides.map((names) => names.sort((a, b) => rank(a) - rank(b)));
  }

  // The table of the edges that `isShown` admits, in the shape of its frame; where nothing of that has changed, it stays.
  show(isShown, state) {
    const now = [state, this.frame.clientWidth, this.frame.clientHeight].join();
    if (now === this.shown) return false;
    this.shown = now;
    const cells = new Map();
    for (const edge of edges.filter(isShown)) cells.set(cellOf(edge), [...(cells.get(cellOf(edge)) ?? []), edge]);
    const sums = [...cells.values()].map(total).sort((a, b) => a - b);
    const most = sums[Math.max(Math.ceil(sums.length * INKED) - 1, 0)] || 1;
    const [left, top, least] = [52, 40, 7];
    const size = (room, count) => Math.max(least, Math.min(room / count, 30));
    const wide = size(this.frame.clientWidth - left - 16, this.columns.length);
    const high = size(this.frame.clientHeight - top - 12, this.rows.length);
    const [width, height] = [left + wide * this.columns.length + 12, top + high * this.rows.length + 8];
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const parts = [draw("rect", { class: "band", x: left, y: top, width: width - left - 12, height: height - top - 8 })];
    const label = (text, x, y, anchor, turned) => {
      const more = turned ? { transform: `rotate(-60 ${x} ${y})` } : {};
      parts.push(draw("text", { class: "side", x, y, style: `text-anchor:${anchor}`, ...more }, text));
    };
    const each = (names, step) => names.map((name, i) => [name, i]).filter(([name, i]) => step >= 9 || i % 2 === 0 || name === "logits");
    for (const [name, i] of each(this.rows, high)) label(name, left - 4, top + (i + 0.5) * high, "end", false);
    for (const [name, i] of each(this.columns, wide)) label(name, left + (i + 0.5) * wide, top - 5, "start", true);
    const names = [...cells.keys()];
    this.boxes = new Map();
    for (const [name, inside] of cells) {
      const [from, to] = name.split(" to ");
      const [x, y] = [left + this.columns.indexOf(to) * wide, top + this.rows.indexOf(from) * high];
      const share = Math.sqrt(Math.min(total(inside) / most, 1));
      const rect = draw("rect", { x, y, width: wide - 1, height: high - 1, style: `fill-opacity:${(0.06 + 0.94 * share).toFixed(3)}` });
      const box = draw("g", { class: "box cell", "data-name": name, tabindex: name === names[0] ? 0 : -1, role: "button" }, rect);
      box.setAttribute("aria-label", `${name}: ${inside.length} edges, ${signed(total(inside)).slice(1)} in all`);
      if (total(inside) > most) box.append(draw("circle", { class: "beyond", cx: x + wide / 2, cy: y + high / 2, r: Math.min(wide, high) / 5 }));
      this.boxes.set(name, box);
    }
    this.svg.replaceChildren(...parts, ...this.boxes.values());
    this.svg.dataset.size = this.svg.getAttribute("viewBox");
    return true;
  }

  // Outlines the cells with an edge of a node, or with the one edge, or those of a group's nodes.
  light(nodes, edge) {
    const lit = new Set(edge ? [cellOf(edge)] : edges.filter(({ from, to }) => nodes.some((node) => from === node || ends(node).includes(to))).map(cellOf));
    for (const [name, box] of this.boxes) box.classList.toggle("lit", lit.has(name) || nodes.includes(name));
    this.svg.classList.toggle("focused", nodes.length > 0 || edge !== null);
  }

  choose(name) {
    for (const [other, box] of this.boxes) box.classList.toggle("chosen", other === name);
  }

  neighbour(name, key) {
    return nearest(this.boxes, name, key);
  }
}

// What a cell says under the pointer.
const describeCell = (name, isShown) => {
  const inside = members(name).filter(isShown).sort((a, b) => strength(b) - strength(a));
  const sum = `${inside.length} ${inside.length === 1 ? "edge" : "edges"}, |effect| ${signed(total(inside)).slice(1)} in all`;
  return [name, sum, `strongest ${inside[0]?.name} ${signed(effect(inside[0] ?? {}))}`];
};
