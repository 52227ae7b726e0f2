// One recorded episode step by step: play, a slider, the arrow keys.

import { Card, make } from "./card.js";

const STEP_MS = 200;
const by = (id) => document.getElementById(id);
let playing = null;
let open = null; // {steps, card, frameUrl}

// steps: lines of steps.jsonl. frameUrl: index of a step -> address of its picture, or null.
export function openPlayer(name, steps, frameUrl) {
  closePlayer();
  if (!steps.length) return by("stage").replaceChildren(make("p", "This episode has no steps.", "muted"));
  open = { steps, frameUrl, card: new Card(name) };
  open.card.element.querySelector("figure").hidden = !frameUrl(0);
  by("stage").replaceChildren(open.card.element);
  by("position").max = steps.length - 1;
  go(0);
}

export function closePlayer() {
  pause();
  open = null;
  by("stage").replaceChildren();
}

function go(index) {
  const { steps, card, frameUrl } = open;
  by("position").value = index;
  by("where").textContent = `${index + 1} of ${steps.length}`;
  card.show(steps, index, true);
  const url = frameUrl(index);
  if (url) card.showFrame(url);
}

const position = () => Number(by("position").value);

function move(steps) {
  pause();
  go(Math.min(Math.max(position() + steps, 0), open.steps.length - 1));
}

function pause() {
  clearInterval(playing);
  playing = null;
  by("play").textContent = "Play";
}

function play() {
  if (playing) return pause();
  by("play").textContent = "Pause";
  if (position() === open.steps.length - 1) go(0);
  playing = setInterval(() => (position() + 1 < open.steps.length ? go(position() + 1) : pause()), STEP_MS);
}

by("play").addEventListener("click", () => open && play());
by("position").addEventListener("input", () => open && move(0));
addEventListener("keydown", (event) => {
  if (!open || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
    event.preventDefault(); // the slider would move once more
    move(event.key === "ArrowLeft" ? -1 : 1);
  }
  if (event.key === " " && event.target.tagName !== "BUTTON") {
    event.preventDefault();
    play();
  }
});
