// Stopping robots by hand: one or all. Holding is one press; releasing takes another button, elsewhere, so that
// no double click and no second press of the space bar sets an arm moving again.

import { by, make, post, read, tell } from "./page.js";

const PATIENCE_MS = 5000;
// Without the /s/ROBOT/ that the page may have been opened below: the button for all means all.
const root = new URL(".", location.href).pathname.replace(/\/s\/[^/]+\/$/, "/");

export const hold = (robot, reason = "Hold on the live page") => send("hold", robot, { reason });
export const release = (robot) => send("release", robot, {});

async function send(action, robot, body) {
  const path = robot === null ? action : `s/${encodeURIComponent(robot)}/${action}`;
  try {
    await read(await post(root + path, body, { signal: AbortSignal.timeout(PATIENCE_MS) }));
    tell("hold-failed", "");
  } catch (error) {
    tell("hold-failed", `The server did not take "${action}" (${error.message}). ${action === "hold" ? "The robot may be moving: use its own stop." : ""}`);
  }
}

// held: {all, robots} as in /health. robots: name -> {card}.
export function showHeld(held, robots) {
  if (!held) return;
  for (const [name, { card }] of robots) card.showHold(findHold(held, name));
  const single = Object.keys(held.robots).filter((name) => held.robots[name]);
  const free = held.all ? Object.keys(held.robots).filter((name) => !held.robots[name]) : [];
  const except = free.length ? ` except ${free.join(", ")}` : "";
  const who = held.all ? `All robots are held${except}` : `Held: ${single.join(", ")}`;
  const why = held.all ? `${held.all.reason}, since ${new Date(1000 * held.all.since).toLocaleString()}` : "";
  by("held-text").replaceChildren(make("strong", who), make("span", why));
  by("held").hidden = !held.all && !single.length;
}

// A robot may be called "constructor", which every object has.
const findHold = (held, name) => (Object.hasOwn(held.robots, name) ? held.robots[name] : held.all);

function takesSpace(event) {
  return event.key === " " && !by("live").hidden && !event.ctrlKey && !event.metaKey && !event.altKey;
}

by("hold-all").addEventListener("click", () => hold(null));
by("release-all").addEventListener("click", () => release(null));
addEventListener("keydown", (event) => {
  if (!takesSpace(event)) return;
  event.preventDefault(); // nor does it scroll, or press the button that has the focus
  if (!event.repeat) hold(null, "space bar on the live page");
});
addEventListener("keyup", (event) => takesSpace(event) && event.preventDefault());
