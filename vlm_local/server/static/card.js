// One robot (or one recorded episode, or one answer of the try-it box): a list of steps, shown at one of them.
// A step is what /act?details=1 answers, plus time, instruction and proprio.

import { by, make } from "./page.js";
import { BUDGET_MS, drawTape, latency, movement } from "./tape.js";

// What can be said of an axis, with its sign: left and right of its bar, and last what stands for no movement. y and yaw
// are drawn as the robot sees them.
const AXES = [
  ["x", ["backward", -1], ["forward", 1], ["stay", 0]],
  ["y", ["left", 1], ["right", -1], ["stay", 0]],
  ["z", ["down", -1], ["up", 1], ["stay", 0]],
  ["tilt", ["tilt down", -1], ["tilt up", 1], ["stay", 0]],
  ["yaw", ["counter\u00adclockwise", 1], ["clockwise", -1], ["stay", 0]],
  ["gripper", ["close", -1], ["open", 1], ["stay", 0]],
];
const IDLE_S = 5;

const ACTION = "dx, dy, dz (m), droll, dpitch, dyaw (rad), gripper (1 open), as the robot was sent them";

// One digit more where "0 %" or "100 %" would be wrong.
export const percent = (share) => `${(100 * share).toFixed(Math.abs(share - 0.5) > 0.495 && Math.abs(share - 0.5) < 0.4995 ? 1 : 0)} %`;

export class Card {
  // stop: {hold, release} of a robot that can be stopped; a recorded step or an answer cannot.
  constructor(name, stop = null) {
    this.element = make("div");
    this.element.append(by("card").content.cloneNode(true));
    this.card = this.element.firstElementChild;
    for (const part of ["frame", "robot", "since", "instruction", "phrase", "sure", "badges", "reasoning", "axes", "tape", "readings"]) {
      this[part] = this.element.querySelector(`.${part}`);
    }
    this.robot.textContent = name;
    this.bars = AXES.map(([, ...choices]) => {
      const row = make("div", "", "axis");
      const track = make("div", "", "track");
      const fills = [make("i"), make("i")];
      track.append(...fills);
      const words = choices.map(([word]) => {
        const choice = make("span", "", "choice");
        choice.append(make("span", word), " ", make("output"));
        return choice;
      });
      row.append(words[0], track, words[1], words[2]);
      this.axes.append(row);
      return { fills, words };
    });
    this.loading = false;
    this.tape.redraw = () => this.redraw();
    new ResizeObserver(this.tape.redraw).observe(this.tape);
    const [row, hold, release] = [".stop", ".stop .hold", ".stop .release"].map((part) => this.element.querySelector(part));
    if (!stop) return row.remove();
    Object.assign(this, { holdButton: hold, releaseButton: release });
    hold.addEventListener("click", stop.hold);
    release.addEventListener("click", stop.release);
  }

  // held: {reason, since} or null.
  showHold(held) {
    this.card.classList.toggle("held", Boolean(held));
    this.holdButton.textContent = held ? "Held" : "Hold";
    this.holdButton.title = held ? held.reason : "The arm stands still, its gripper kept";
    this.releaseButton.hidden = !held;
  }

  // steps: oldest first; the one at `index` is shown, the tape ends there (live) or marks it (recorded).
  show(steps, index, recorded = false) {
    const step = steps[index];
    this.step = step;
    this.instruction.textContent = step.instruction ?? "";
    this.phrase.textContent = step.phrase ?? (step.fault ? "standing still" : "an action without words");
    this.sure.textContent = describeSureness(step);
    this.showBadges(step);
    this.showReasoning(step.extra ?? {});
    AXES.forEach((axis, row) => showAxis(this.bars[row], axis, step));
    this.card.classList.toggle("faulty", Boolean(step.fault));
    this.showReadings(step);
    this.drawn = [steps, index, recorded];
    this.redraw();
  }

  redraw() {
    if (this.drawn) drawTape(this.tape, ...this.drawn);
  }

  showBadges(step) {
    const cut = step.extra?.cut;
    const badges = [];
    if (step.fault) badges.push(make("span", step.extra?.hold ? step.fault : `Stand-still: ${step.fault}`, "bad"));
    if (step.extra?.gripper) badges.push(make("span", `Gripper ${step.extra.gripper}`, "warn"));
    if (cut?.length) badges.push(make("span", `Safety cut ${cut.join(", ")}`, "warn"));
    if (step.extra?.same_picture) badges.push(make("span", `Same picture for ${step.extra.same_picture} steps`, "warn"));
    if (step.extra?.short_episodes) badges.push(make("span", `${step.extra.short_episodes} episodes of one step: two arms?`, "warn"));
    if (step.extra?.held) badges.push(make("span", `Phrase held, step ${step.extra.held + 1}`));
    this.badges.replaceChildren(...badges);
  }

  // What the model wrote at an earlier step, as text: its words are nobody's markup.
  showReasoning({ reasoning, reasoning_step: step, reasoning_age: age, reasoning_tokens: tokens, reasoning_ms: ms }) {
    this.reasoning.hidden = reasoning === undefined;
    const cost = ms === undefined ? "" : `, ${tokens} tokens in ${Number(ms).toFixed(0)} ms`;
    const title = reasoning ? `Reasoning about step ${step}, ${age === 1 ? "1 step" : `${age} steps`} before this${cost}` : "No reasoning yet";
    this.reasoning.firstElementChild.textContent = title;
    this.reasoning.lastElementChild.textContent = reasoning ?? "";
  }

  showReadings(step) {
    const total = latency(step);
    const late = total > BUDGET_MS;
    const stages = Object.entries(step.timings_ms ?? {}).map(([name, ms]) => `${name} ${ms.toFixed(1)} ms`);
    const rows = [
      ["episode", step.episode],
      ["step", step.step],
      ["latency", total === undefined ? "–" : `${total.toFixed(total < 10 ? 1 : 0)} ms`, stages.join("\n"), late],
      ["gripper", describeGripper(step)],
      ["action", step.action ? `[${step.action.map((value) => Number(value.toFixed(4))).join(", ")}]` : null, ACTION],
    ];
    if (step.proprio) {
      const [x, y, z] = step.proprio;
      rows.push(["position", `x ${x.toFixed(3)}  y ${y.toFixed(3)}  z ${z.toFixed(3)} m`, "in the robot's base frame"]);
    }
    this.readings.replaceChildren(...rows.filter(([, value]) => value !== undefined && value !== null).map(reading));
  }

  // Live only: how long ago the last step was.
  showAge(seconds) {
    this.card.classList.toggle("idle", seconds > IDLE_S);
    this.since.textContent = seconds > IDLE_S ? `idle ${formatDuration(seconds)}` : "live";
  }

  // At most one picture under way: a slow link shows fewer frames, never old ones.
  showFrame(url) {
    this.wanted = url;
    if (!this.loading) this.load();
  }

  load() {
    const url = this.wanted;
    this.loading = true;
    this.frame.onload = this.frame.onerror = () => {
      this.loading = false;
      if (this.wanted !== url) this.load();
    };
    this.frame.src = url;
  }
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const tape of document.querySelectorAll(".tape")) tape.redraw();
});

export function formatDuration(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${String(Math.round(seconds % 60)).padStart(2, "0")} s`;
  return `${Math.floor(seconds / 3600)} h ${String(Math.floor((seconds % 3600) / 60)).padStart(2, "0")} min`;
}

export function reading([name, value, title = "", bad = false]) {
  const row = make("div");
  const term = make("dd", String(value), bad ? "bad" : "");
  if (title) row.title = title;
  row.append(make("dt", name), term);
  return row;
}

function describeSureness(step) {
  if (step.probability === null || step.probability === undefined) return "";
  const text = `${percent(step.probability)} sure`;
  const { sampled, likeliest } = step.extra ?? {};
  const best = likeliest?.[0];
  if (best && best[0] !== step.phrase) return `${text}, ${sampled ? "sampled; " : ""}likeliest: ${best[0]} ${percent(best[1])}`;
  const second = step.probability - (step.margin ?? NaN);
  const next = Number.isNaN(second) ? text : `${text}, next best ${percent(second)}`;
  return sampled ? `${next}, sampled` : next;
}

function describeGripper(step) {
  const command = movement(step)?.[6];
  if (command === undefined) return null;
  const word = command >= 0.5 ? "open" : "closed";
  return step.proprio ? `${word}, measured ${percent(step.proprio[6])}` : word;
}

function showAxis({ fills, words }, [axis, ...choices], step) {
  const chosen = step.axes?.[axis];
  const marginal = step.marginals?.[axis]; // p(-1), p(0), p(+1)
  choices.forEach(([, sign], at) => {
    const isChosen = chosen === sign;
    words[at].classList.toggle("chosen", isChosen);
    words[at].lastChild.textContent = marginal ? percent(marginal[sign + 1]) : "";
    if (!fills[at]) return;
    fills[at].style.width = `${50 * (marginal ? marginal[sign + 1] : Number(isChosen))}%`;
    fills[at].className = isChosen ? "chosen" : "";
  });
}
