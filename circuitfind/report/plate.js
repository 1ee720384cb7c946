// One drawing of the circuit: which of its arrows and boxes are shown, and which are lit up.

// The data block: edges by name, shared key/value heads with the heads they serve, and the words of every size.
const data = JSON.parse(document.getElementById("data").textContent);
const FIELDS = ["from", "to", "kind", "estimate", "exact", "low", "high", "size", "mark"];
const edges = Object.entries(data.edges).map(([name, values]) => ({
  name,
  ...Object.fromEntries(FIELDS.map((field, i) => [field, values[i]])),
  place: data.places[name].length ? `at ${data.places[name][0][0]}` : null,
}));
const edgeNamed = new Map(edges.map((edge) => [edge.name, edge]));
const effect = (edge) => edge.exact ?? edge.estimate;
const strength = (edge) => Math.abs(effect(edge) ?? 0);

// Where a node's inputs end: at its own box, and at the box of the key/value head that it shares.
const ends = (name) => [name, ...Object.keys(data.shared).filter((shared) => data.shared[shared].includes(name))];
const inputs = (name) => edges.filter((edge) => ends(name).includes(edge.to));
const outputs = (name) => edges.filter((edge) => edge.from === name);

class Plate {
  constructor(element) {
    this.element = element;
    this.svg = element.querySelector("svg");
    this.last = Number(element.dataset.last);
    this.boxes = new Map([...this.svg.querySelectorAll(".box")].map((box) => [box.dataset.name, box]));
    this.arrows = [...this.svg.querySelectorAll(".arrow")].map((arrow) => [arrow, edgeNamed.get(arrow.dataset.edge)]);
    for (const title of this.svg.querySelectorAll("title")) title.remove(); // the page has a tooltip of its own
    for (const [name, box] of this.boxes) {
      box.setAttribute("role", "button");
      box.setAttribute("aria-label", name);
      box.setAttribute("aria-pressed", "false");
    }
    const first = this.boxes.get("logits") ?? this.boxes.values().next().value;
    if (first) first.tabIndex = 0;
  }

  // Hides the arrows that `isShown` refuses; boxes that no arrow is left at fade.
  show(isShown) {
    const used = new Set();
    for (const [arrow, edge] of this.arrows) {
      const shown = isShown(edge);
      arrow.classList.toggle("hidden", !shown);
      if (shown) used.add(edge.from).add(edge.to);
    }
    for (const [name, box] of this.boxes) box.classList.toggle("unused", !used.has(name));
  }

  // Lights up nodes with their arrows and what lies at the other ends, or one edge; nothing where there is neither.
  light(nodes, edge) {
    const near = new Set(edge ? [edge.from, edge.to] : nodes);
    const into = new Set(nodes.flatMap(ends));
    for (const [arrow, other] of this.arrows) {
      const lit = edge ? other === edge : nodes.includes(other.from) || into.has(other.to);
      arrow.classList.toggle("lit", lit);
      if (lit && !arrow.classList.contains("hidden")) near.add(other.from).add(other.to);
    }
    for (const name of [...into, ...nodes.flatMap((node) => data.shared[node] ?? [])]) near.add(name);
    for (const [name, box] of this.boxes) box.classList.toggle("lit", near.has(name));
    this.svg.classList.toggle("focused", nodes.length > 0 || edge !== null);
  }

  choose(node) {
    for (const [name, box] of this.boxes) {
      box.classList.toggle("chosen", name === node);
      box.setAttribute("aria-pressed", String(name === node));
    }
  }

  neighbour(name, key) {
    return nearest(this.boxes, name, key);
  }
}

// The nearest box (of `[name, element]`) in the direction of an arrow key, or null.
const nearest = (boxes, name, key) => {
  const centre = (box) => {
    const frame = box.getBoundingClientRect();
    return [frame.x + frame.width / 2, frame.y + frame.height / 2];
  };
  const [x, y] = centre(boxes.get(name));
  const [dx, dy] = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[key];
  let [best, least] = [null, Infinity];
  for (const [other, box] of boxes) {
    const [ox, oy] = centre(box);
    const along = (ox - x) * dx + (oy - y) * dy;
    const aside = Math.abs((ox - x) * dy) + Math.abs((oy - y) * dx);
    const cost = along + 2 * aside;
    if (other === name || box.classList.contains("unused") || along <= 2 || cost >= least) continue;
    [best, least] = [other, cost];
  }
  return best;
};
