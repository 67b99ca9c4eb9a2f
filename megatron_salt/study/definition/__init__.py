"""What a study is to do: STUDY.yaml, its arms, and the jobs that follow from them."""
