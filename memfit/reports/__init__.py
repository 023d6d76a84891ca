"""Shows finished records to people: text, tables, pictures and pages. It measures nothing."""
