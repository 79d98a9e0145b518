"""Why an answer: heat maps, layers and feature maps, made by processes of their own."""
