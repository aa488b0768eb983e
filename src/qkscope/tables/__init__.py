"""What an evaluation sees of features and pairs in the text, and the Parquet tables it writes of that."""
