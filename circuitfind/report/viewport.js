// Zoom and pan: which part of a drawing its frame shows. Wheel, two fingers, drag, buttons and keys all end in `zoom`,
// `pan` and `fit`; the drawing itself is moved by its viewBox alone.
const MOST_ZOOM = 5; // pixels a unit of the drawing
const START_ZOOM = 1.4;
const LEAST_READABLE = 0.6;
const FAR = 0.4; // below it the boxes' names would be specks
const LEAST_LETTER = 9; // pixels on the screen
const LETTER = 0.58; // width of a letter, of its height
const LABEL_SIZE = 12; // larger, only a layer's number has room beside the boxes
const SLACK = 4; // pixels that a click may move

class Viewport {
  constructor(frame) {
    this.frame = frame;
    this.fingers = new Map();
    this.dragged = false;
    frame.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    frame.addEventListener("pointerdown", (event) => this.#press(event));
    window.addEventListener("pointermove", (event) => this.#move(event));
    for (const kind of ["pointerup", "pointercancel"]) {
      window.addEventListener(kind, (event) => {
        this.fingers.delete(event.pointerId);
        if (!this.fingers.size) setTimeout(() => (this.dragged = false)); // after the click that ends the drag
        frame.classList.toggle("dragging", this.fingers.size > 0 && this.dragged);
      });
    }
    new ResizeObserver(() => this.svg && this.resized()).observe(frame);
  }

  // The frame has another size: what was zoomed keeps its scale, what was not fits again.
  resized() {
    if (this.touched) this.#apply();
    else this.fit(this.overview);
  }

  // Takes up a drawing and shows it from its start.
  show(svg) {
    this.svg = svg;
    this.labels = svg.querySelectorAll(".layer");
    this.names = [...svg.querySelectorAll(".box text")].map((text) => [text, (text.dataset.name ??= text.textContent), text.previousSibling.width.baseVal.value]);
    svg.dataset.size ??= svg.getAttribute("viewBox");
    [, , this.width, this.height] = svg.dataset.size.split(" ").map(Number);
    this.fit(false);
  }

  // The whole drawing; without `overview`, in a narrow frame, its whole width, or as much of its top as can be read.
  fit(overview = true) {
    const { clientWidth: width, clientHeight: height } = this.frame;
    this.whole = Math.min(width / this.width, height / this.height, START_ZOOM);
    const across = Math.min(width / this.width, START_ZOOM);
    this.scale = overview || width > 640 ? this.whole : across < FAR ? LEAST_READABLE : across;
    this.x = (this.width - width / this.scale) / 2;
    this.y = 0;
    this.touched = false;
    this.overview = overview;
    this.#apply();
  }

  // Zooms about a point of the screen, by default the frame's centre.
  zoom(factor, clientX, clientY) {
    const frame = this.frame.getBoundingClientRect();
    const px = (clientX ?? frame.x + frame.width / 2) - frame.x;
    const py = (clientY ?? frame.y + frame.height / 2) - frame.y;
    const scale = Math.min(Math.max(this.scale * factor, this.whole), MOST_ZOOM);
    this.x += px / this.scale - px / scale;
    this.y += py / this.scale - py / scale;
    this.scale = scale;
    this.touched = true;
    this.#apply();
  }

  // Moves the drawing by so many pixels.
  pan(dx, dy) {
    this.x -= dx / this.scale;
    this.y -= dy / this.scale;
    this.touched = true;
    this.#apply();
  }

  // Pans until an element of the drawing is in sight.
  reveal(element) {
    const [frame, box] = [this.frame.getBoundingClientRect(), element.getBoundingClientRect()];
    const off = (low, high, from, to) => (low < from ? from - low : high > to ? to - high : 0);
    const dx = off(box.left, box.right, frame.left + 16, frame.right - 16);
    const dy = off(box.top, box.bottom, frame.top + 16, frame.bottom - 16);
    if (dx || dy) this.pan(dx, dy);
  }

  #apply() {
    const [width, height] = [this.frame.clientWidth / this.scale, this.frame.clientHeight / this.scale];
    const within = (at, seen, all) => (seen >= all ? (all - seen) / 2 : Math.min(Math.max(at, 0), all - seen));
    this.x = within(this.x, width, this.width);
    this.y = within(this.y, height, this.height);
    this.svg.setAttribute("viewBox", `${this.x} ${this.y} ${width} ${height}`);
    for (const [text, name, room] of this.names) { // as large on the screen at every zoom, shorter where there is no room
      const size = (some) => Math.min(12 / this.scale, 15, room / (some.length * LETTER));
      const said = size(name) * this.scale >= LEAST_LETTER ? name : name.split(".").at(-1);
      text.textContent = said;
      text.style.fontSize = `${size(said)}px`;
    }
    this.svg.style.setProperty("--thin", Math.min(1, START_ZOOM / this.scale));
    const size = Math.max(11, 9 / this.scale);
    for (const label of this.labels) { // layers keep their names in sight, in letters that can be read
      label.dataset.name ??= label.textContent;
      label.textContent = size > LABEL_SIZE ? label.dataset.name.split(" ").at(-1) : label.dataset.name;
      label.setAttribute("x", Math.max(10, this.x + 8 / this.scale));
      label.style.fontSize = `${size}px`;
    }
    this.frame.style.touchAction = this.scale > this.whole * 1.001 ? "none" : "pan-x pan-y";
  }

  #wheel(event) {
    const unit = [1, 16, 400][event.deltaMode];
    const factor = Math.exp(-event.deltaY * unit * (event.ctrlKey ? 0.01 : 0.0015));
    if (factor < 1 && this.scale <= this.whole * 1.001) return; // nothing to zoom out of: the page scrolls
    event.preventDefault();
    this.zoom(factor, event.clientX, event.clientY);
  }

  #press(event) {
    if (event.button) return;
    if (!this.fingers.size) this.dragged = false;
    const [x, y] = [event.clientX, event.clientY];
    this.fingers.set(event.pointerId, { x, y, startX: x, startY: y });
  }

  #move(event) {
    const finger = this.fingers.get(event.pointerId);
    if (!finger) return;
    if (event.pointerType === "mouse" && !event.buttons) { // let go outside the window
      this.fingers.clear();
      return;
    }
    const [dx, dy] = [event.clientX - finger.x, event.clientY - finger.y];
    const other = [...this.fingers.entries()].find(([id]) => id !== event.pointerId)?.[1];
    if (other) {
      const far = (x, y) => Math.max(Math.hypot(x - other.x, y - other.y), 1);
      const factor = far(event.clientX, event.clientY) / far(finger.x, finger.y);
      this.zoom(factor, (event.clientX + other.x) / 2, (event.clientY + other.y) / 2);
      this.pan(dx / 2, dy / 2);
      this.dragged = true;
    } else if (this.dragged || Math.hypot(event.clientX - finger.startX, event.clientY - finger.startY) > SLACK) {
      this.dragged = true;
      this.pan(dx, dy);
    } else return;
    this.frame.classList.add("dragging");
    [finger.x, finger.y] = [event.clientX, event.clientY];
  }
}
