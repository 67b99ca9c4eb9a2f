"""--teacher-cache: the teacher's last hidden states on disk, which one run writes and others read instead of computing them."""
