"""Images and models: from encoded bytes to pixels, and from pixels to scores. No HTTP, no asyncio."""
