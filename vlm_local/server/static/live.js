// The page's frame: which part is shown, the stream of steps, the counters at the top.

import { Card, formatDuration, reading } from "./card.js";
import { hold, release, showHeld } from "./hold.js";
import { by, tell } from "./page.js";
import { showPart } from "./parts.js";
import { offerFrames } from "./try.js";

const KEPT = 64;
const RETRY_MS = 2000;
const LONGEST_RETRY_MS = 60000; // a page that was left open with an old token should not fill the log
const SILENT_MS = 5000; // the server tells its status every second
const FOLD_S = 60; // a robot that has been idle for so long moves below the others and folds
const KEYS = { 1: "#live", 2: "#episodes", 3: "#try", 4: "#detector" };
const robots = new Map(); // name -> {steps, card, arrived}
let held = null; // as /health tells it
let retryMs = RETRY_MS; // doubles with each refusal

function route() {
  const name = showPart("live", "episodes", "try", "detector");
  if (name === "try") offer();
  if (name === "live") robots.forEach(paint);
}

function offer() {
  offerFrames([...robots].map(([robot, { steps }]) => [robot, steps.at(-1)]));
}

function robotOf(name) {
  if (!robots.has(name)) {
    const card = new Card(name, { hold: () => hold(name), release: () => release(name) });
    robots.set(name, { name, steps: [], card, arrived: 0 });
    place(robots.get(name), false);
    by("waiting").hidden = true;
    showHeld(held, robots);
  }
  return robots.get(name);
}

// Puts the robot's card, by name, among those that act or those that are folded.
function place(robot, isFolded) {
  const home = by(isFolded ? "folded" : "robots");
  const { element } = robot.card;
  if (element.parentElement === home) return;
  const after = [...robots.values()].filter((other) => other.card.element.parentElement === home && other.name > robot.name);
  after.sort((one, other) => (one.name < other.name ? -1 : 1));
  home.insertBefore(element, after[0]?.card.element ?? null);
}

function take(step, age = 0) {
  const robot = robotOf(step.robot);
  robot.steps.push(step);
  if (robot.steps.length > KEPT) robot.steps.shift();
  robot.arrived = performance.now() - 1000 * age;
  if (!robot.dirty) {
    robot.dirty = true;
    requestAnimationFrame(() => paint(robot));
  }
}

function paint(robot) {
  robot.dirty = false;
  if (by("live").hidden || !robot.steps.length) return;
  const step = robot.steps.at(-1);
  robot.card.show(robot.steps, robot.steps.length - 1);
  robot.card.showFrame(`live/frame/${encodeURIComponent(step.robot)}?at=${step.episode}.${step.step}`);
  age(robot);
}

function age(robot) {
  const seconds = (performance.now() - robot.arrived) / 1000;
  robot.card.showAge(seconds);
  // No button moves away from under a hand.
  if (!document.querySelector(".stop:hover")) place(robot, seconds > FOLD_S);
}

function showStatus(status) {
  const pill = by("state");
  pill.textContent = status.state;
  pill.className = `pill ${{ healthy: "good", loading: "warn" }[status.state] ?? "bad"}`;
  document.body.classList.remove("lost");
  retryMs = RETRY_MS;
  by("model").textContent = status.model ?? "";
  by("untrained").hidden = status.trained !== false;
  held = status.held;
  showHeld(held, robots);
  const recording = status.recording;
  const rows = [
    ["robots", robots.size],
    ["episodes", status.episodes],
    ["steps", status.steps.toLocaleString("en")],
    ["held", status.held_steps, "steps stood still because a person pressed Hold"],
    ["faults", status.faults, "stand-still answers in place of the model's", status.faults > 0],
    ["refused", status.refusals, status.last_refusal ?? "", status.refusals > 0],
    ["waiting", status.waiting, "requests in the queue"],
    ["up", formatDuration(status.uptime_s)],
  ];
  if (recording) {
    const lost = recording.lost ? `, ${recording.lost} lost` : "";
    rows.push(["recorded", `${recording.written.toLocaleString("en")}${lost}`, `${recording.queued} in the queue`, recording.lost > 0]);
  } else {
    rows.push(["recording", "off"]);
  }
  if (status.tunnel) rows.push(["tunnel", status.tunnel, "", status.tunnel !== "up"]);
  by("counters").replaceChildren(...rows.map(reading));
  tell("notice", recording?.error ? `Recording is losing steps: ${recording.error}` : "");
  by("waiting").hidden = robots.size > 0;
}

function connect() {
  const stream = new EventSource("live/events");
  let heard = performance.now();
  const on = (name, act) => stream.addEventListener(name, (event) => {
    heard = performance.now();
    act(JSON.parse(event.data));
  });
  on("snapshot", ({ robots: known, now }) => {
    for (const steps of Object.values(known)) {
      if (robots.has(steps[0].robot)) robots.get(steps[0].robot).steps.length = 0;
      for (const step of steps) take(step, Math.max(0, now - step.time));
    }
    offer();
  });
  on("step", (step) => take(step));
  on("status", showStatus);
  // A server that hangs, or a link that is gone without a word, is no error to the browser.
  const watch = setInterval(() => performance.now() - heard > SILENT_MS && lose(false), 1000);
  const lose = async (isRefused) => {
    clearInterval(watch);
    stream.close();
    document.body.classList.add("lost");
    by("state").textContent = "no connection";
    by("state").className = "pill bad";
    const refusal = isRefused ? await findRefusal() : null;
    if (refusal !== null) by("state").textContent = "refused";
    tell("notice", refusal === null ? "" : `The server refuses this page: ${refusal}`);
    retryMs = refusal === null ? RETRY_MS : Math.min(2 * retryMs, LONGEST_RETRY_MS);
    setTimeout(connect, retryMs);
  };
  stream.onerror = () => lose(stream.readyState === EventSource.CLOSED);
}

// Why the server answered the stream with an error, which an EventSource does not tell; null where it does not any more.
async function findRefusal() {
  const question = new AbortController();
  setTimeout(() => question.abort(), SILENT_MS);
  try {
    const answer = await fetch("live/events", { signal: question.signal });
    return answer.ok ? null : (await answer.json()).error;
  } catch {
    return null;
  } finally {
    question.abort();
  }
}

by("address").textContent = new URL("act", location.href.replace(/#.*/, "")).href;
addEventListener("hashchange", route);
addEventListener("keydown", (event) => {
  const isTyping = ["INPUT", "SELECT"].includes(event.target.tagName) && event.target.type !== "range";
  if (KEYS[event.key] && !isTyping && !event.ctrlKey && !event.metaKey && !event.altKey) location.hash = KEYS[event.key];
});
setInterval(() => robots.forEach(age), 1000);
route();
connect();
