"""See what the experts of a trained model learned: `collect` runs it over images, `measures` are pure functions,
`figures` draw, `report` writes the folder."""
