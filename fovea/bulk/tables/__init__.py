"""Files that hold a table: Parquet, CSV and JSON Lines, chosen by the end of the name."""
