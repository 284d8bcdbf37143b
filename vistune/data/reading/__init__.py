"""What the formats share: rows by place in JSON files, tables and tars, and what columns and picture paths mean."""
