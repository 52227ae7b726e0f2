// One recorded episode step by step: play, a slider, the arrow keys.

import { Card } from "./card.js";
import { by, make } from "./page.js";

const STEP_MS = 200;
let playing = null;
let open = null; // of each episode {steps, frameUrl, card}

// Episodes of {name, steps, frameUrl}, which stand beside each other and go step by step together. steps: lines of
// steps.jsonl. frameUrl: index of a step -> address of its picture, or null.
export function openPlayer(...episodes) {
  closePlayer();
  if (!episodes[0].steps.length) return by("stage").replaceChildren(make("p", "This episode has no steps.", "muted"));
  open = episodes.filter(({ steps }) => steps.length).map((episode) => ({ ...episode, card: new Card(episode.name) }));
  for (const { card, frameUrl } of open) card.element.querySelector("figure").hidden = !frameUrl(0);
  by("stage").replaceChildren(...open.map(({ card }) => card.element));
  by("position").max = count() - 1;
  go(0);
}

export function closePlayer() {
  pause();
  open = null;
  by("stage").replaceChildren();
}

const count = () => Math.max(...open.map(({ steps }) => steps.length));

// The shorter episode stays at its last step.
function go(index) {
  by("position").value = index;
  by("where").textContent = `${index + 1} of ${count()}`;
  for (const { steps, card, frameUrl } of open) {
    const at = Math.min(index, steps.length - 1);
    card.show(steps, at, true);
    const url = frameUrl(at);
    if (url) card.showFrame(url);
  }
}

const position = () => Number(by("position").value);

function move(steps) {
  pause();
  go(Math.min(Math.max(position() + steps, 0), count() - 1));
}

export const goTo = (index) => open && move(index - position());

function pause() {
  clearInterval(playing);
  playing = null;
  by("play").textContent = "Play";
}

function play() {
  if (playing) return pause();
  by("play").textContent = "Pause";
  if (position() === count() - 1) go(0);
  playing = setInterval(() => (position() + 1 < count() ? go(position() + 1) : pause()), STEP_MS);
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
