/** A button that copies the address of what is shown. */

import { link } from "./address.js";
import { make, say } from "./dom.js";

/** Milliseconds for which the button says that it has copied. */
const SAID = 2000;

export function shareButton() {
  const button = make(
    "button",
    {
      type: "button",
      class: "share-link",
      title: "Copy a link to this model, label and map. The photo stays on this computer",
      on: { click: () => copy(button) },
    },
    "Copy link",
  );
  return button;
}

async function copy(button) {
  try {
    await navigator.clipboard.writeText(link());
  } catch {
    copyWithoutClipboard(link()); // browsers have no clipboard on plain HTTP
    button.focus();
  }
  say("The link was copied");
  button.textContent = "Copied";
  window.setTimeout(() => (button.textContent = "Copy link"), SAID);
}

function copyWithoutClipboard(text) {
  const field = make("textarea", { class: "unseen", value: text });
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}
