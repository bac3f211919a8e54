"""A run from a YAML file: `loading` makes it of a configuration, `executing` takes it from there to a report in its `folder`.

`data` and `user_rewards` are what it reads (`data`: files, by `reading` and `tables`, to `examples`, to tokens by `encoding`), `resuming`
where it goes on, `report`, `figure` and `progress` what a person sees of it, with the words of `labels`. `trackers`
shows it to those of `tracker_kinds`. `whole_files` writes a file whole or not at all.
"""
