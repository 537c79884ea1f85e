//go:build !linux

package log

import "os"

func fdatasync(f *os.File) error { return f.Sync() }

// flock does nothing: the appliance runs on Linux, developers elsewhere.
func flock(*os.File) error { return nil }
