/** One photo by the camera, in a dialog of its own. */

import { byId } from "./dom.js";

const dialog = /** @type {HTMLDialogElement} */ (byId("camera"));
const video = dialog.querySelector("video");
const fault = /** @type {HTMLElement} */ (dialog.querySelector(".fault"));
const take = /** @type {HTMLButtonElement} */ (dialog.querySelector("[data-take]"));

dialog.querySelector("[data-cancel]").addEventListener("click", () => dialog.close());

/** Show the camera's picture until one is taken. @returns {Promise<File | null>} null if none was */
export async function takePhoto() {
  fault.hidden = true;
  take.disabled = true;
  dialog.showModal();
  const taken = shot(); // it may be cancelled before the camera has started
  const stream = await open();
  try {
    return await taken;
  } finally {
    stream?.getTracks().forEach((track) => track.stop());
    if (video.srcObject === stream) video.srcObject = null;
  }
}

/** Start the camera; what prevents it is said in the dialog. */
async function open() {
  try {
    if (!navigator.mediaDevices) throw new DOMException("", "InsecureContext");
    const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    video.srcObject = stream;
    video.play().then(() => (take.disabled = false), tell);
    return stream;
  } catch (error) {
    tell(error);
    return null;
  }
}

function tell(error) {
  fault.textContent = reason(error);
  fault.hidden = false;
}

function reason(error) {
  const known = {
    InsecureContext:
      "Browsers lend the camera only to pages from this machine or over HTTPS. Choose a file instead.",
    NotAllowedError:
      "This page is not allowed to use the camera. The browser's settings for this site can change that.",
    NotFoundError: "There is no camera.",
    NotReadableError: "Another program is using the camera.",
  };
  return known[error.name] ?? `The camera does not start: ${error.message || error.name}`;
}

/** @returns {Promise<File | null>} */
function shot() {
  return new Promise((resolve) => {
    const over = new AbortController();
    const end = (file) => {
      over.abort();
      dialog.close();
      resolve(file);
    };
    take.addEventListener("click", async () => end(await frame()), { signal: over.signal });
    dialog.addEventListener("close", () => end(null), { signal: over.signal });
  });
}

async function frame() {
  const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
  canvas.getContext("2d").drawImage(video, 0, 0);
  const picture = await canvas.convertToBlob({ type: "image/jpeg", quality: 0.95 });
  return new File([picture], `camera ${new Date().toLocaleTimeString()}`, { type: picture.type });
}
