// Ask the model about one image, beside all robots.

import { Card, percent } from "./card.js";
import { by, make, post, tell } from "./page.js";

let image = null; // data URL

export function offerFrames(robots) {
  const buttons = robots.map(([robot, step]) => {
    const button = make("button", `Use what ${robot} sees`);
    button.type = "button";
    button.addEventListener("click", async () => {
      const answer = await fetch(`live/frame/${encodeURIComponent(robot)}?format=png`);
      takeFile(await answer.blob());
      if (!by("instruction").value) by("instruction").value = step.instruction;
    });
    return button;
  });
  by("borrow").replaceChildren(...buttons);
}

function takeFile(file) {
  if (!file) return;
  const reader = new FileReader();
  reader.onload = () => {
    image = reader.result;
    by("preview").src = image;
    by("preview").hidden = false;
    by("hint").hidden = true;
  };
  reader.readAsDataURL(file);
}

async function ask(event) {
  event.preventDefault();
  refuse("");
  if (!image) return refuse("Choose an image first.");
  by("ask").disabled = true;
  try {
    const answer = await post("live/try", { image, instruction: by("instruction").value });
    const body = await answer.json();
    answer.ok ? show(body) : refuse(body.error);
  } catch (error) {
    refuse(`The server did not answer: ${error.message}`);
  } finally {
    by("ask").disabled = false;
  }
}

function show(step) {
  const card = new Card("your image");
  by("answer").replaceChildren(card.element);
  card.show([step], 0);
  const likeliest = step.extra.likeliest ?? [];
  if (!likeliest.length) return;
  const rows = likeliest.map(([phrase, probability]) => {
    const row = make("tr");
    row.append(make("td", phrase, phrase === step.phrase ? "chosen" : ""), make("td", percent(probability)));
    return row;
  });
  const table = make("table");
  table.append(make("caption", "The likeliest phrases"), ...rows);
  by("answer").append(table);
}

function refuse(why) {
  tell("refusal", why);
  if (why) by("answer").replaceChildren();
}

by("question").addEventListener("submit", ask);
by("file").addEventListener("change", (event) => takeFile(event.target.files[0]));
addEventListener("paste", (event) => takeFile([...event.clipboardData.files].find((file) => file.type.startsWith("image/"))));
for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  by("drop").addEventListener(name, (event) => {
    event.preventDefault();
    by("drop").classList.toggle("over", over);
    if (name === "drop") takeFile(event.dataTransfer.files[0]);
  });
}
