"""Images and models: encoded bytes to pixels, and pixels to probabilities. No HTTP, no asyncio."""
