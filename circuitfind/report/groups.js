// Groups of nodes under a name: those of circuit.json, and those made here, with the line of Python that keeps them.
const GROUP_COLOURS = ["#cc79a7", "#e69f00", "#56b4e9", "#d55e00", "#8f7ae5", "#7a9a01"];

class Groups {
  // `light(nodes)`: lights up a group; `changed()`: its members are others now.
  constructor(row, keep, light, changed) {
    Object.assign(this, { row, keep, light, changed, lit: null });
    this.members = new Map(Object.entries(data.groups).map(([name, nodes]) => [name, new Set(nodes)]));
    this.#list();
  }

  colour(name) {
    return GROUP_COLOURS[[...this.members.keys()].indexOf(name) % GROUP_COLOURS.length];
  }

  of(node) {
    return [...this.members.keys()].filter((name) => this.members.get(name).has(node));
  }

  put(name, node, inside) {
    const nodes = this.members.get(name) ?? new Set();
    if (inside) nodes.add(node);
    else nodes.delete(node);
    if (nodes.size) this.members.set(name, nodes);
    else this.members.delete(name);
    const lines = [...this.members].map(([group, some]) => `circuit = circuit.with_group(${JSON.stringify(group)}, ${JSON.stringify([...some])})`);
    this.keep.querySelector("pre").textContent = [...lines, 'circuit.save("circuit.json")'].join("\n");
    this.keep.hidden = false;
    this.#list();
    this.changed();
  }

  // Rings the boxes of a drawing that belong to a group.
  ring(boxes) {
    for (const [name, box] of boxes) {
      const group = this.of(name)[0];
      box.classList.toggle("grouped", group !== undefined);
      if (group !== undefined) box.style.setProperty("--group", this.colour(group));
    }
  }

  // What the panel says of a node: its groups, each a button that takes it out, and a field for another.
  about(node) {
    const out = this.of(node).map((name) => {
      const button = make("button", "chip", this.#key(name), `${name} ×`);
      button.setAttribute("aria-label", `Take ${node} out of ${name}`);
      button.addEventListener("click", () => this.put(name, node, false));
      return button;
    });
    const field = make("input", "");
    field.placeholder = "add to a group, such as name movers";
    field.setAttribute("aria-label", `Add ${node} to a group`);
    field.setAttribute("list", "known-groups");
    field.addEventListener("change", () => field.value.trim() && this.put(field.value.trim(), node, true));
    return [make("h4", "", "Groups"), make("p", "groups", ...out, field)];
  }

  #key(name) {
    const key = make("i", "key");
    key.style.setProperty("--group", this.colour(name));
    return key;
  }

  #list() {
    const known = make("datalist", "", ...[...this.members.keys()].map((name) => new Option(name)));
    known.id = "known-groups";
    const chips = [...this.members].map(([name, nodes]) => {
      const button = make("button", "chip", this.#key(name), `${name} (${nodes.size})`);
      button.type = "button";
      button.style.setProperty("--group", this.colour(name));
      button.addEventListener("click", () => this.press(name));
      button.dataset.group = name;
      return button;
    });
    this.row.replaceChildren(known, ...chips);
    this.press(this.lit !== null && this.members.has(this.lit) ? this.lit : null, false);
  }

  // Lights a group up, or, pressed again, nothing.
  press(name, turn = true) {
    this.lit = turn && name === this.lit ? null : name;
    for (const chip of this.row.querySelectorAll(".chip")) chip.setAttribute("aria-pressed", String(chip.dataset.group === this.lit));
    if (turn) this.light([...(this.members.get(this.lit) ?? [])]);
  }
}
