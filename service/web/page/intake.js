/** The ways by which photos come in: dropped, pasted, chosen, taken by camera, or one of the page's own. */

import { sample } from "./api.js";
import { takePhoto } from "./camera.js";
import { byId } from "./dom.js";

const LINK =
  "that is a link, and this page loads nothing from elsewhere: save the picture, and choose its file";

let pasted = 0;

/**
 * Listen for photos.
 * @param {(files: (File | URL)[]) => void} receive called with at least one; with the address of a photo where the service fetches it
 * @param {(message: string) => void} fail called where a sample cannot be had, or a link came instead of a photo
 * @param {() => void} expect called, once or more, where a photo will probably come soon
 */
export function listen(receive, fail, expect) {
  const chooser = /** @type {HTMLInputElement} */ (byId("files"));
  byId("choose").addEventListener("click", () => {
    chooser.click();
    expect();
  });
  chooser.addEventListener("change", () => {
    hand(chooser.files, receive);
    chooser.value = ""; // so that the same file can be chosen again
  });
  byId("shoot").addEventListener("click", async () => {
    expect();
    hand([await takePhoto()].filter(Boolean), receive);
  });
  document.addEventListener("dragenter", ({ dataTransfer }) => dataTransfer.types.includes("Files") && expect());
  const address = /** @type {HTMLFormElement} */ (byId("address"));
  const follow = (link) => (address.hidden ? fail(LINK) : receive([new URL(link.trim())]));
  document.addEventListener("paste", (event) => {
    hand([...event.clipboardData.files].map(renamed), receive);
    const isLink = !event.clipboardData.files.length && isUrl(event.clipboardData.getData("text/plain"));
    if (isLink && !event.target.closest?.("input")) follow(event.clipboardData.getData("text/plain"));
  });
  address.addEventListener("submit", (event) => {
    event.preventDefault();
    follow(/** @type {HTMLInputElement} */ (byId("address-value")).value);
    address.reset();
  });
  listenForDrops(receive, follow);
  for (const image of document.querySelectorAll(".samples img")) {
    for (const event of ["pointerenter", "focus"]) image.parentElement.addEventListener(event, expect);
    image.parentElement.addEventListener("click", () =>
      sample(image.dataset.photo).then(
        (file) => receive([file]),
        ({ message }) => fail(message),
      ),
    );
  }
  // `early.js` hands over what came before.
  document.dispatchEvent(new CustomEvent("intake", { detail: { receive } }));
}

function isUrl(text) {
  return /^https?:\S+$/.test(text.trim());
}

function listenForDrops(receive, follow) {
  const over = (on) => document.body.classList.toggle("over", on);
  document.addEventListener("dragover", (event) => {
    const has = (type) => event.dataTransfer.types.includes(type);
    if (!has("Files") && !has("text/uri-list")) return;
    event.preventDefault(); // or the browser would open the file, or follow the link
    over(has("Files"));
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget || over(false));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    over(false);
    hand(event.dataTransfer.files, receive);
    const [link] = event.dataTransfer.getData("text/uri-list").split(/\s/);
    if (!event.dataTransfer.files.length && isUrl(link)) follow(link);
  });
}

function hand(files, receive) {
  if (files.length) receive([...files]);
}

/** Browsers call every pasted picture image.png. */
function renamed(file) {
  pasted += 1;
  return new File([file], `pasted ${pasted}`, { type: file.type });
}
