// The tooltip: an edge's exact and estimated effect, a node's counts.
const tip = document.getElementById("tip");

// As in the tables: three digits and a sign.
const signed = (value) => {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  const digits = size >= 1e-4 || size === 0 ? String(Number(size.toPrecision(3))) : size.toExponential(2);
  return (value < 0 ? "−" : "+") + digits;
};

const describe = (edge) => {
  const between = edge.low === null ? "" : ` (${data.level} ${signed(edge.low)} to ${signed(edge.high)})`;
  const lines = [
    edge.name,
    edge.exact === null ? "exact: not measured" : `exact ${signed(edge.exact)}${between}`,
    `estimate ${signed(edge.estimate)}`,
  ];
  const places = data.places[edge.name].map(([place, value]) => `${place} ${signed(value)}`);
  if (places.length) lines.push(`at ${places.join(", ")}`);
  if (edge.exact * edge.estimate < 0) lines.push("the estimate has the wrong sign"); // null counts as 0
  return lines;
};

const showTip = (lines, x, y) => {
  tip.replaceChildren(
    ...lines.map((line) => {
      const row = document.createElement("div");
      row.textContent = line;
      return row;
    }),
  );
  tip.hidden = false;
  const [width, height] = [tip.offsetWidth, tip.offsetHeight];
  tip.style.left = `${Math.max(4, Math.min(x + 14, window.innerWidth - width - 4))}px`;
  tip.style.top = `${y + 18 + height > window.innerHeight ? Math.max(4, y - height - 10) : y + 18}px`;
};

const hideTip = () => {
  tip.hidden = true;
};

// The arrow under a point of the screen, or the nearest within a few pixels, for arrows are thin and dashed ones have
// gaps; null where there is none.
const ROUND = [[1, 0], [0, 1], [-1, 0], [0, -1], [0.7, 0.7], [-0.7, 0.7], [0.7, -0.7], [-0.7, -0.7]];
const AROUND = [[0, 0], ...[2, 4, 6].flatMap((radius) => ROUND.map(([dx, dy]) => [radius * dx, radius * dy]))];
const arrowAt = (x, y) => {
  for (const [dx, dy] of AROUND) {
    const found = document.elementFromPoint(x + dx, y + dy)?.closest(".arrow[data-edge]");
    if (found) return edgeNamed.get(found.dataset.edge);
  }
  return null;
};
