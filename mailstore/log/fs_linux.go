package log

import (
	"os"
	"syscall"
)

// fdatasync syncs content and size, not times: one journal commit less.
func fdatasync(f *os.File) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var errno error
	err = rc.Control(func(fd uintptr) {
		for {
			if errno = syscall.Fdatasync(int(fd)); errno != syscall.EINTR {
				return
			}
		}
	})
	if err == nil && errno != nil {
		err = &os.PathError{Op: "fdatasync", Path: f.Name(), Err: errno}
	}
	return err
}

func flock(f *os.File) error {
	return syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
}
