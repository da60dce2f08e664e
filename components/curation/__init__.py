"""Raw shards in; filters, notions, the data contract; curated shards out."""
