"""Where images come from; the only importer of grain and of data set libraries."""
