// The last actions on one canvas: a column a step, a row an axis with bars up for plus and down for
// minus, then the gripper's two jaws and the latency. Lines part episodes, a red column is a fault.

export const BUDGET_MS = 200; // 5 Hz
const AXES = ["x", "y", "z", "roll", "pitch", "yaw"];
const LABEL = 50; // pixels for a row's name
const SHOWN = 64;

// In the Bridge frame; recordings of the simulator know no other.
export const movement = (step) => step.meant ?? step.action;

export function latency(step) {
  return step.timings_ms?.total ?? step.timings_ms?.policy;
}

// Live, the newest step stands at the right edge; of a recorded episode all are shown and one is marked.
export function drawTape(canvas, steps, index, recorded) {
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (!width || !height) return;
  const scale = window.devicePixelRatio || 1;
  canvas.width = width * scale;
  canvas.height = height * scale;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const style = getComputedStyle(canvas);
  const shown = recorded ? steps : steps.slice(Math.max(0, index + 1 - SHOWN), index + 1);
  const columns = recorded ? Math.max(steps.length, 12) : SHOWN;
  const column = (width - LABEL) / columns;
  const empty = recorded ? 0 : columns - shown.length;
  const view = {
    pen, shown, column,
    width, height,
    row: height / (AXES.length + 2),
    bar: Math.max(1, column - Math.min(2, column / 4)),
    left: (at) => LABEL + (empty + at) * column,
    colour: (name) => style.getPropertyValue(`--${name}`).trim(),
  };
  if (recorded) fillColumn(view, index, view.colour("track"));
  drawNames(view, style.fontFamily);
  AXES.forEach((_, axis) => drawAxis(view, axis));
  drawGripper(view);
  drawLatency(view);
  drawMarks(view);
}

function drawNames({ pen, row, width, colour }, family) {
  pen.font = `11px ${family}`;
  pen.textBaseline = "middle";
  [...AXES, "gripper", "latency"].forEach((name, at) => {
    const middle = (at + 0.5) * row;
    pen.fillStyle = colour("muted");
    pen.fillText(name, 0, middle);
    pen.fillStyle = colour("line");
    if (at < AXES.length) pen.fillRect(LABEL, Math.round(middle), width - LABEL, 1);
  });
}

function drawAxis({ pen, shown, row, bar, left, colour }, axis) {
  const values = shown.map((step) => movement(step)?.[axis] ?? 0);
  const largest = Math.max(1e-9, ...values.map(Math.abs));
  pen.fillStyle = colour("accent");
  values.forEach((value, at) => {
    const size = (value / largest) * (row / 2 - 2);
    if (size) pen.fillRect(left(at), (axis + 0.5) * row - Math.max(size, 0), bar, Math.abs(size));
  });
}

function drawGripper({ pen, shown, row, column, left, colour }) {
  const middle = (AXES.length + 0.5) * row;
  pen.fillStyle = colour("ink");
  shown.forEach((step, at) => {
    const gap = (movement(step)?.[6] ?? 0) * (row / 3.4);
    pen.fillRect(left(at), middle - gap - 1, column + 0.5, 2);
    pen.fillRect(left(at), middle + gap - 1, column + 0.5, 2);
  });
}

function drawLatency({ pen, shown, row, bar, left, height, colour }) {
  const largest = Math.max(BUDGET_MS, ...shown.map((step) => latency(step) ?? 0));
  shown.forEach((step, at) => {
    const ms = latency(step) ?? 0;
    const size = Math.max(1, (ms / largest) * (row - 4));
    pen.fillStyle = colour(ms > BUDGET_MS ? "bad" : "quiet");
    pen.fillRect(left(at), height - size - 1, bar, size);
  });
}

function drawMarks(view) {
  const { pen, shown, left, height, colour } = view;
  shown.forEach((step, at) => {
    if (at && step.episode !== shown[at - 1].episode) {
      pen.fillStyle = colour("muted");
      pen.fillRect(Math.round(left(at)) - 1, 0, 1, height);
    }
    pen.globalAlpha = 0.3;
    if (step.fault) fillColumn(view, at, colour("bad"));
    pen.globalAlpha = 1;
  });
}

function fillColumn({ pen, column, left, height }, at, colour) {
  pen.fillStyle = colour;
  pen.fillRect(left(at), 0, Math.max(column, 2), height);
}
