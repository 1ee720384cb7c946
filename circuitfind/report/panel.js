// The side panel: what a chosen node reads and writes most strongly, and what it attends to.
const STRONGEST = 8;

const make = (tag, className, ...children) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
};

const kindOf = (name) => {
  if (name === "input") return "the embeddings";
  if (name === "logits") return "the output";
  const [, node, layer, part, number] = /^([ams])(\d+)(?:\.(h|kv)(\d+))?$/.exec(name);
  if (!part) return `${node === "s" ? "mixer" : "MLP"} of layer ${layer}`;
  return part === "h" ? `head ${number} of layer ${layer}` : `shared key/value head ${number} of layer ${layer}`;
};

class Panel {
  // `choose(name)`: goes to a node; `point(edge)`: lights an edge up; `example`: which prompt's patterns are shown.
  constructor(element, choose, point, groups) {
    Object.assign(this, { element, choose, point, groups, example: 0, longer: new Set() });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#redraw());
    new ResizeObserver(() => this.#redraw()).observe(element);
  }

  // Shows a node or a cell of the matrix with those of its edges that `isShown` admits; nothing for null.
  show(name, isShown) {
    const focused = this.element.contains(document.activeElement);
    this.element.hidden = name === null;
    if (name !== this.name) this.longer.clear();
    this.name = name;
    this.map = null;
    if (name === null) return this.element.replaceChildren();
    const close = make("button", "close", "×");
    close.type = "button";
    close.setAttribute("aria-label", "Close");
    close.addEventListener("click", () => this.choose(null));
    const title = make("h3", "", name);
    title.tabIndex = -1;
    const refresh = () => this.show(name, isShown);
    const parts = [close, title];
    if (isCell(name)) parts.push(...this.#list("edges", members(name).filter(isShown), "name", refresh));
    else parts.push(...this.#node(name, isShown, refresh));
    this.element.replaceChildren(...parts);
    if (focused) title.focus({ preventScroll: true }); // what had the focus is gone
    return this.#redraw();
  }

  #node(name, isShown, refresh) {
    const parts = [make("p", "soft", kindOf(name))];
    if (data.direct[name] !== undefined) parts.push(make("p", "", `Directly adds ${signed(data.direct[name])} to the logit difference.`));
    if (name !== "input") parts.push(...this.#list("inputs", inputs(name).filter(isShown), "from", refresh));
    if (data.shared[name]) parts.push(...this.#serves(name));
    else if (name !== "logits") parts.push(...this.#list("outputs", outputs(name).filter(isShown), "to", refresh));
    if (!data.shared[name]) parts.push(...this.groups.about(name));
    if (/\.h\d+$/.test(name)) parts.push(...this.#attention(name));
    return parts;
  }

  #list(title, all, end, refresh) {
    const sorted = [...all].sort((a, b) => strength(b) - strength(a));
    const shown = this.longer.has(title) ? sorted : sorted.slice(0, STRONGEST);
    const heading = make("h4", "", `Strongest ${title}`, make("span", "soft", ` (${all.length} shown)`));
    if (!all.length) return [heading];
    const items = shown.map((edge) => make("li", "", this.#edge(edge, end, strength(sorted[0]))));
    const head = make("div", "row head", make("span", "", ""), make("span", "", "exact"), make("span", "", "estimate"));
    const parts = [heading, head, make("ul", "edges", ...items)];
    if (shown.length < sorted.length) {
      const more = make("button", "more", `all ${sorted.length}`);
      more.type = "button";
      more.addEventListener("click", () => {
        this.longer.add(title);
        refresh();
      });
      parts.push(more);
    }
    return parts;
  }

  // An edge as a button that goes to its other end.
  #edge(edge, end, largest) {
    const reader = edge.kind.length === 1 ? `${end === "to" ? edge.to : ""}<${edge.kind}>` : edge.to;
    const via = end === "from" && edge.to !== this.name ? ` via ${edge.to}` : "";
    const said = { from: edge.from, to: reader, name: edge.name }[end];
    const name = make("span", "name", make("i", `key ${edge.mark ?? edge.kind}`), said);
    if (end === "from" && edge.kind.length === 1) name.append(make("span", "soft", ` ${edge.kind}${via}`));
    const number = (value) => make("span", `number${value < 0 ? " minus" : ""}`, signed(value));
    const button = make("button", "row", name, number(edge.exact), number(edge.estimate));
    button.type = "button";
    button.title = describe(edge).join("\n");
    button.style.setProperty("--share", largest ? strength(edge) / largest : 0);
    button.addEventListener("click", () => this.choose(end === "name" ? edge.from : edge[end]));
    for (const kind of ["pointerenter", "focus"]) button.addEventListener(kind, () => this.point(edge));
    for (const kind of ["pointerleave", "blur"]) button.addEventListener(kind, () => this.point(null));
    return button;
  }

  #serves(name) {
    const heads = data.shared[name].map((head) => {
      const button = make("button", "more", head);
      button.type = "button";
      button.addEventListener("click", () => this.choose(head));
      return button;
    });
    return [make("h4", "", "Heads that share it"), make("p", "", ...heads)];
  }

  #attention(name) {
    const heading = make("h4", "", "Attention");
    const known = data.attention.filter((example) => example.heads[name]);
    if (!known.length) return [heading, make("p", "soft", data.note)];
    const example = known[Math.min(this.example, known.length - 1)];
    const said = make("p", "said");
    said.setAttribute("aria-live", "polite");
    this.map = new Heatmap(example.tokens, example.heads[name], said);
    const parts = [heading];
    if (known.length > 1) {
      const select = make("select", "");
      select.setAttribute("aria-label", "Prompt");
      known.forEach((other, i) => select.add(new Option(other.prompt, i, i === this.example, i === this.example)));
      select.addEventListener("change", () => {
        this.example = select.selectedIndex;
        const now = known[this.example];
        this.map = new Heatmap(now.tokens, now.heads[name], said);
        this.element.querySelector("canvas").replaceWith(this.map.canvas);
        this.#redraw();
      });
      parts.push(select);
    } else parts.push(make("p", "soft prompt", example.prompt));
    const note = "Rows: queries, columns: keys; darker = more weight (square-root scale).";
    return [...parts, this.map.canvas, said, make("p", "soft", note), ...this.#why(name)];
  }

  // The parts of the head's sharpest attention score, by node on either side and by pair.
  #why(name) {
    const why = data.attention[0]?.why[name];
    if (!why) return [];
    const lists = ["query side", "key side", "pairs"].map((side) => {
      const rows = why[side].map(([what, value]) => {
        const number = make("span", `number${value < 0 ? " minus" : ""}`, signed(value));
        return make("li", "", make("span", "name", what), number);
      });
      return make("div", "", make("h5", "", side), make("ul", "", ...rows));
    });
    return [make("h4", "", "Why it attends where it does"), make("p", "soft", why.said), make("div", "why", ...lists)];
  }

  #redraw() {
    if (this.map && !this.element.hidden) this.map.draw(Math.min(this.element.clientWidth - 28, 420));
  }
}
