// Past episodes: the list of this run, and one of them step by step.

import { Card, formatDuration, make } from "./card.js";

const STEP_MS = 200;
const by = (id) => document.getElementById(id);
let playing = null;
let open = null; // {id, steps, card}

export async function showList() {
  by("list").hidden = false;
  by("player").hidden = true;
  const answer = await fetchJson("live/episodes");
  by("folder").textContent = answer.folder ?? "";
  by("none").hidden = answer.episodes.length > 0;
  by("none").textContent = answer.folder ? "Nothing has been recorded yet." : "Recording is off: serve with --record DIR.";
  by("rows").replaceChildren(...answer.episodes.map(row));
}

function row(episode) {
  const line = make("tr");
  const link = make("a", episode.id);
  link.href = `#episodes/${encodeURIComponent(episode.id)}`;
  const name = make("td");
  name.append(link);
  const started = episode.started ? new Date(1000 * episode.started).toLocaleString() : "";
  line.append(name, make("td", episode.instruction), make("td", episode.num_steps), make("td", episode.num_faults, episode.num_faults ? "bad" : ""));
  line.append(make("td", formatDuration(episode.duration_s)), make("td", started));
  return line;
}

export async function showEpisode(id) {
  by("list").hidden = true;
  by("player").hidden = false;
  const { steps } = await fetchJson(`live/episodes/${encodeURIComponent(id)}`);
  if (!steps.length) return by("stage").replaceChildren(make("p", "This episode has no steps.", "muted"));
  open = { id, steps, card: new Card(id) };
  by("stage").replaceChildren(open.card.element);
  by("position").max = steps.length - 1;
  go(0);
}

export function leaveEpisode() {
  pause();
  open = null;
  by("stage").replaceChildren();
}

function go(index) {
  const { id, steps, card } = open;
  by("position").value = index;
  by("where").textContent = `${index + 1} of ${steps.length}`;
  card.show(steps, index, true);
  card.showFrame(`live/episodes/${encodeURIComponent(id)}/frames/${index}`);
}

function pause() {
  clearInterval(playing);
  playing = null;
  by("play").textContent = "Play";
}

function play() {
  if (playing) return pause();
  by("play").textContent = "Pause";
  if (Number(by("position").value) === open.steps.length - 1) go(0);
  playing = setInterval(() => {
    const next = Number(by("position").value) + 1;
    next < open.steps.length ? go(next) : pause();
  }, STEP_MS);
}

async function fetchJson(url) {
  const answer = await fetch(url);
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error);
  return body;
}

by("play").addEventListener("click", play);
by("position").addEventListener("input", () => {
  pause();
  go(Number(by("position").value));
});
addEventListener("keydown", (event) => {
  if (!open || event.target.matches("input[type=text]")) return;
  if (event.key === " " && event.target.tagName !== "BUTTON") {
    event.preventDefault();
    play();
  }
});
addEventListener("resize", () => open && go(Number(by("position").value)));
