export function openLayers() {}
export function closeLayers() {}
export function showInput() {}
