// Recorded episodes: the list with its filters, and one of them in the player.

import { formatDuration, percent } from "./card.js";
import { by, make, read } from "./page.js";
import { goTo, openPlayer } from "./player.js";

const FILTERS = ["words", "outcome", "day", "run", "doubt", "faulty"];
let listed = { folders: [], total: 0, episodes: [] };
let current = null; // address of the episode in the player
let shownSteps = []; // of it

const address = (episode) => `${episode.run}/${encodeURIComponent(episode.id)}`;
const day = (episode) => (episode.started ? new Date(1000 * episode.started).toLocaleDateString() : "");
const outcome = (episode) => episode.outcome ?? "";
const ask = async (url) => read(await fetch(url));

export async function showList() {
  by("list").hidden = false;
  by("player").hidden = true;
  const left = current;
  current = null;
  await loadList();
  findLinks().find((link) => link.hash === `#episodes/${left}`)?.focus();
}

async function loadList() {
  listed = await ask("live/episodes");
  by("folders").textContent = listed.folders.join(", ");
  offer("outcome", "any outcome", listed.episodes.map(outcome));
  offer("day", "any day", listed.episodes.map(day));
  offer("run", "all runs", listed.folders);
  paintList();
}

// A choice among `values` and all of them; hidden where there is nothing to choose.
function offer(id, all, values) {
  const select = by(id);
  const chosen = select.value;
  const different = [...new Set(values)].filter(Boolean);
  select.replaceChildren(new Option(all, ""), ...different.map((value) => new Option(value, value)));
  select.value = different.includes(chosen) ? chosen : "";
  select.hidden = new Set(values).size < 2;
}

function passes(episode) {
  const words = by("words").value.toLowerCase().split(/\s+/);
  return (
    words.every((word) => episode.instruction.toLowerCase().includes(word)) &&
    ["", outcome(episode)].includes(by("outcome").value) &&
    ["", day(episode)].includes(by("day").value) &&
    ["", listed.folders[episode.run]].includes(by("run").value) &&
    (!by("doubt").value || (episode.lowest !== null && episode.lowest < Number(by("doubt").value))) &&
    (!by("faulty").checked || episode.num_faults > 0 || episode.outcome === "faulted")
  );
}

const findShown = () => listed.episodes.filter(passes);

function paintList() {
  const shown = findShown();
  const newest = listed.episodes.length < listed.total ? `the newest ${listed.episodes.length} of ${listed.total}` : listed.total;
  by("shown").textContent = `${shown.length < listed.total ? `${shown.length} of ` : ""}${newest} ${listed.total === 1 ? "episode" : "episodes"}`;
  by("none").hidden = shown.length > 0;
  by("filter").hidden = !listed.total;
  document.querySelector("#list table").hidden = !shown.length;
  const empty = listed.folders.length ? "Nothing has been recorded yet." : "Recording is off: serve with --record DIR.";
  by("none").textContent = listed.total ? "No episode passes these filters." : empty;
  by("rows").replaceChildren(...shown.map(row));
}

function row(episode) {
  const line = make("tr");
  const link = make("a", episode.id.replaceAll("_", "_\u200b")); // may break there
  link.href = `#episodes/${address(episode)}`;
  const name = make("td");
  name.append(link);
  if (listed.folders.length > 1) name.append(make("small", listed.folders[episode.run].split("/").at(-1), "muted"));
  const started = episode.started ? new Date(1000 * episode.started).toLocaleString() : "";
  const words = make("td");
  words.append(make("span", episode.instruction, "words"));
  words.title = episode.instruction;
  line.append(thumbnail(episode), name, words, make("td", outcome(episode), outcome(episode)));
  line.append(make("td", episode.num_steps, "steps"), make("td", episode.num_faults, episode.num_faults ? "bad" : ""));
  line.append(make("td", episode.lowest === null ? "" : percent(episode.lowest)));
  line.append(make("td", formatDuration(episode.duration_s)), make("td", started));
  return line;
}

// The last picture that the policy saw.
function thumbnail(episode) {
  const cell = make("td", "", "thumbnail");
  if (!episode.has_frames) return cell;
  const image = make("img");
  Object.assign(image, { alt: "", loading: "lazy", width: 64, height: 64 });
  image.src = `live/episodes/${address(episode)}/frames/${episode.num_steps - 1}`;
  cell.append(image);
  return cell;
}

export async function showEpisode(run, id) {
  by("list").hidden = true;
  by("player").hidden = false;
  current = `${run}/${encodeURIComponent(id)}`;
  if (!listed.total) await loadList();
  const episode = listed.episodes.find((other) => address(other) === current);
  const noted = [outcome(episode ?? {}), episode?.has_frames === false ? "no pictures were kept" : ""];
  by("outcome-of").textContent = noted.filter(Boolean).join(", ");
  offerBeside(episode);
  await openTracks();
}

// Other runs' episodes of the same name and instruction: a replay, or another policy in the same scene.
function offerBeside(episode) {
  const isTwin = (other) => other.id === episode.id && other.instruction === episode.instruction && other.run !== episode.run;
  const twins = episode ? listed.episodes.filter(isTwin) : [];
  const options = twins.map((twin) => new Option(`beside ${nameRun(twin)}`, address(twin)));
  by("beside").replaceChildren(new Option("alone", ""), ...options);
  by("beside").hidden = !twins.length;
}

const nameRun = (episode) => listed.folders[episode.run].split("/").at(-1);

async function openTracks() {
  const asked = [current, by("beside").value].filter(Boolean);
  const found = await Promise.all(asked.map((place) => ask(`live/episodes/${place}`))).catch((error) => error);
  if (asked[0] !== current) return; // another was chosen meanwhile
  if (found instanceof Error) return by("stage").replaceChildren(make("p", found.message, "notice"));
  shownSteps = found[0].steps;
  openPlayer(...asked.map((place, at) => {
    const episode = listed.episodes.find((other) => address(other) === place);
    const name = asked.length > 1 ? `${episode.id}, ${nameRun(episode)}` : decodeURIComponent(place.split("/")[1]);
    const frameUrl = (index) => (episode?.has_frames === false ? null : `live/episodes/${place}/frames/${index}`);
    return { name, steps: found[at].steps, frameUrl };
  }));
}

function showDoubt() {
  const sureness = shownSteps.map((step) => step.probability ?? Infinity);
  const lowest = Math.min(...sureness);
  if (lowest < Infinity) goTo(sureness.indexOf(lowest));
}

// The episode before (-1) or after (1) the one in the player, of those that pass the filters.
function turn(offset) {
  const shown = findShown();
  const at = shown.findIndex((episode) => address(episode) === current);
  const next = shown[at + offset];
  if (next) location.hash = `#episodes/${address(next)}`;
}

const findLinks = () => [...by("rows").querySelectorAll("a")];

function moveFocus(offset) {
  const links = findLinks();
  const at = links.indexOf(document.activeElement);
  links[Math.min(Math.max(at + offset, 0), links.length - 1)]?.focus();
}

for (const id of FILTERS) by(id).addEventListener("input", paintList);
by("filter").addEventListener("submit", (event) => event.preventDefault());
by("beside").addEventListener("input", openTracks);
by("doubtful").addEventListener("click", showDoubt);
by("previous").addEventListener("click", () => turn(-1));
by("next").addEventListener("click", () => turn(1));
addEventListener("keydown", (event) => {
  if (by("episodes").hidden || event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
  if (event.key === "ArrowUp" || event.key === "ArrowDown") {
    event.preventDefault(); // the slider would move, the page scroll
    (current ? turn : moveFocus)(event.key === "ArrowUp" ? -1 : 1);
  }
  if (event.key === "d" && current) showDoubt();
  if (event.key === "Escape" && current) location.hash = "#episodes";
});
