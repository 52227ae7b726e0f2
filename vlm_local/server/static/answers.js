// What a detector was asked: each picture with its answer, and a button for each choice. Pressing one says what is right.

import { by, make, post, read, tell } from "./page.js";

const EVERY_MS = 2000;
const tiles = new Map(); // id -> {element, said, buttons}
let timer = null;

export function showAnswers() {
  leaveAnswers();
  load();
  timer = setInterval(load, EVERY_MS);
}

export function leaveAnswers() {
  clearInterval(timer);
}

async function load() {
  try {
    paint(await read(await fetch("live/answers")));
  } catch (error) {
    tell("answers-refusal", `The server did not answer: ${error.message}`);
  }
}

function paint({ place, questions }) {
  by("answers-place").textContent = place ? `Kept in ${place}` : "Recording is off: serve with --record DIR to keep corrections.";
  const known = new Set(questions.map(({ id }) => id));
  for (const id of tiles.keys()) if (!known.has(id)) tiles.delete(id);
  by("asked").replaceChildren(...questions.map(tileOf));
  if (!questions.length) by("asked").append(make("p", "Nothing has been asked yet.", "muted"));
}

function tileOf(asked) {
  if (!tiles.has(asked.id)) tiles.set(asked.id, build(asked));
  const { element, buttons } = tiles.get(asked.id);
  for (const [choice, button] of buttons) button.setAttribute("aria-pressed", choice === asked.label);
  return element;
}

function build({ id, question, choices, said }) {
  const element = make("div", "", "tile");
  const image = make("img");
  Object.assign(image, { alt: question, loading: "lazy", src: address(id) });
  const row = make("div", "", "choices");
  const buttons = choices.map((choice) => {
    const button = make("button", choice, "plain");
    button.type = "button";
    button.addEventListener("click", () => correct(id, choice));
    row.append(button);
    return [choice, button];
  });
  element.append(image, make("p", question, "muted"), make("p", said), row);
  return { element, buttons };
}

const address = (id) => `live/answers/${encodeURIComponent(id)}`;

async function correct(id, choice) {
  tell("answers-refusal", "");
  try {
    await read(await post(address(id), { answer: choice }));
  } catch (error) {
    return tell("answers-refusal", `The answer was not kept: ${error.message}`);
  }
  load();
}
