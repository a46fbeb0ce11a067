"""Files of records, such as JSON lines, CSV and Parquet: their fields, their examples, and what counts in the loss."""
