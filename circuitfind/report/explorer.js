// The circuit's page at work: slider, filters, pointer and keys, all of which change `state` and call `paint`.
if (edges.length) {
  const by = (id) => document.getElementById(id);
  const [canvas, slider, said] = [by("canvas"), by("size"), by("said")];
  const idle = said.textContent;
  const plates = [...canvas.querySelectorAll(".plate")].map((element) => new Plate(element));
  const matrix = new Matrix(canvas.appendChild(make("div", "plate")), canvas);
  const view = new Viewport(canvas);
  const state = { size: Number(slider.value), view: null, off: new Set(), chosen: null, node: null, edge: null, group: [] };
  let plate = null;

  const inSize = (edge) => edge.size <= state.size;
  const sign = (edge) => (effect(edge) < 0 ? "opposes" : "supports");
  const isShown = (edge) => inSize(edge) && ![edge.kind, sign(edge), edge.mark, edge.place].some((value) => state.off.has(value));

  const choose = (name) => {
    const [before, inPanel] = [state.chosen, by("panel").contains(document.activeElement)];
    state.chosen = name;
    state.node = state.edge = null;
    paint();
    if (name === null && inPanel && plate.boxes.has(before)) focusBox(before);
    const box = plate.boxes.get(name);
    if (!box) return;
    view.resized(); // the panel may just have opened
    view.reveal(box);
    focusBox(name, false);
  };
  const point = (edge) => {
    state.edge = edge;
    light();
  };
  const groups = new Groups(by("groups"), by("keep"), (nodes) => {
    state.group = nodes;
    light();
  }, () => paint());
  const panel = new Panel(by("panel"), choose, point, groups);

  // The one box that Tab comes to.
  const focusBox = (name, now = true) => {
    for (const [other, box] of plate.boxes) box.tabIndex = other === name ? 0 : -1;
    if (now) plate.boxes.get(name).focus({ preventScroll: true });
  };

  const light = () => {
    const node = state.node ?? state.chosen;
    plate.light(state.edge ? [] : node ? [node] : state.group, state.edge);
    if (state.edge) said.textContent = describe(state.edge).join("; ");
    else if (node) said.textContent = counted(node);
    else said.textContent = idle;
  };
  const counted = (name) => {
    if (isCell(name)) return describeCell(name, isShown).join("; ");
    const [into, out] = [inputs(name).filter(isShown).length, outputs(name).filter(isShown).length];
    return `${name}: ${into} ${into === 1 ? "edge" : "edges"} in, ${out} out`;
  };

  const words = () => {
    const { edges: count, said: measured } = data.sizes[state.size];
    const hidden = edges.filter((edge) => inSize(edge) && !isShown(edge)).length;
    const filter = hidden ? `; the filter hides ${hidden} of them` : "";
    const beyond = plate !== matrix && plate.last < state.size ? `; the graph shows the strongest ${plate.arrows.length}` : "";
    return `${count.toLocaleString("en")} of ${data.whole.toLocaleString("en")} edges: ${measured}${filter}${beyond}`;
  };

  const paint = () => {
    const drawn = plates.find((other) => other.last >= state.size);
    const asMatrix = (state.view ?? (drawn ? "graph" : "matrix")) === "matrix";
    const next = asMatrix ? matrix : (drawn ?? plates.at(-1));
    const anew = asMatrix && matrix.show(isShown, [state.size, ...state.off]);
    if (next !== plate) {
      plate = next;
      for (const other of [...plates, matrix]) other.element.hidden = other !== plate;
      for (const element of document.querySelectorAll(".of-graph")) element.hidden = asMatrix;
      document.querySelector(".of-matrix").hidden = !asMatrix;
      document.querySelector(`[name="view"][value="${asMatrix ? "matrix" : "graph"}"]`).checked = true;
      if (isCell(state.chosen) && !asMatrix) state.chosen = null;
      view.show(plate.svg);
    } else if (anew) view.show(plate.svg);
    if (!asMatrix) plate.show(isShown);
    groups.ring(plate.boxes);
    plate.choose(state.chosen);
    panel.show(state.chosen, isShown);
    by("shown").textContent = words();
    slider.setAttribute("aria-valuetext", words());
    light();
  };

  // The frame is as high as its largest drawing needs or the panel beside it, and leaves room to scroll past it.
  const shape = () => {
    const needed = plates.map(({ svg }) => {
      const [width, height] = (svg.dataset.size ?? svg.getAttribute("viewBox")).split(" ").slice(2).map(Number);
      return height * Math.min(canvas.clientWidth / width, START_ZOOM);
    });
    const room = window.innerHeight * (canvas.clientWidth > 640 ? 0.76 : 0.6);
    canvas.style.minHeight = `${Math.max(260, Math.min(Math.max(...needed), room))}px`;
  };

  // ---------------------------------------------------------------- controls
  slider.addEventListener("input", () => {
    state.size = Number(slider.value);
    paint();
  });
  for (const box of document.querySelectorAll(".chips input")) {
    box.addEventListener("change", () => {
      const value = box.dataset.kind ?? box.dataset.sign ?? box.dataset.mark ?? `at ${box.dataset.place}`;
      if (box.checked) state.off.delete(value);
      else state.off.add(value);
      paint();
    });
  }
  for (const radio of document.querySelectorAll("[name=view]")) {
    radio.addEventListener("change", () => {
      state.view = radio.value;
      paint();
    });
  }
  const find = by("find");
  const nodes = [...new Set(edges.flatMap((edge) => [edge.from, edge.to]))];
  by("names").append(...[...nodes, ...groups.members.keys()].map((name) => new Option(name)));
  find.addEventListener("change", () => {
    const text = find.value.trim().toLowerCase();
    const group = [...groups.members.keys()].find((name) => name.toLowerCase() === text);
    const node = nodes.find((name) => name === text) ?? nodes.find((name) => name.includes(text));
    if (text && group !== undefined) groups.press(group);
    else if (text && node) choose(node);
    else if (text) said.textContent = `no node of the circuit and no group matches “${text}”`;
  });
  const zooms = { in: () => view.zoom(1.5), out: () => view.zoom(1 / 1.5), fit: () => view.fit() };
  for (const button of document.querySelectorAll("[data-zoom]")) {
    button.addEventListener("click", zooms[button.dataset.zoom]);
  }

  // ---------------------------------------------------------------- pointer
  const pointAt = (event) => {
    const node = event.target.closest(".box")?.dataset.name ?? null;
    const edge = node ? null : arrowAt(event.clientX, event.clientY);
    if (node !== state.node || edge !== state.edge) {
      Object.assign(state, { node, edge });
      light();
    }
    if (state.edge) showTip(describe(state.edge), event.clientX, event.clientY);
    else if (node) showTip(isCell(node) ? describeCell(node, isShown) : [counted(node), kindOf(node)], event.clientX, event.clientY);
    else hideTip();
  };
  canvas.addEventListener("pointermove", (event) => {
    if (view.fingers.size && view.dragged) hideTip();
    else pointAt(event);
  });
  canvas.addEventListener("pointerleave", () => {
    state.node = state.edge = null;
    hideTip();
    light();
  });
  canvas.addEventListener("click", (event) => {
    if (view.dragged) return;
    const box = event.target.closest(".box");
    if (box) choose(box.dataset.name);
    else if (arrowAt(event.clientX, event.clientY)) pointAt(event);
    else choose(null);
  });

  // ---------------------------------------------------------------- keys
  canvas.addEventListener("focusin", (event) => {
    const box = event.target.closest(".box");
    if (!box?.matches(":focus-visible")) return;
    state.node = box.dataset.name;
    view.reveal(box);
    light();
  });
  canvas.addEventListener("focusout", () => {
    state.node = null;
    light();
  });
  const keys = { "+": zooms.in, "=": zooms.in, "-": zooms.out, 0: zooms.fit };
  canvas.addEventListener("keydown", (event) => {
    const name = event.target.closest(".box")?.dataset.name;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (keys[event.key]) keys[event.key]();
    else if (name && event.key.startsWith("Arrow")) {
      const next = plate.neighbour(name, event.key);
      if (next) focusBox(next);
    } else if (name && (event.key === "Enter" || event.key === " ")) choose(name);
    else return;
    event.preventDefault();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && state.chosen) choose(null);
    else if (event.key === "/" && !event.target.closest?.("input, select")) {
      find.focus();
      event.preventDefault();
    }
  });

  for (const element of document.querySelectorAll(".slider, .tools, .zoom, .keys")) element.hidden = false;
  if (data.sizes.length < 2) document.querySelector(".slider input").hidden = true;
  canvas.classList.add("live");
  shape();
  window.addEventListener("resize", shape);
  new ResizeObserver(() => plate === matrix && paint()).observe(canvas);
  paint();
}
