"""Classification of many images: a table with one row for each image."""
