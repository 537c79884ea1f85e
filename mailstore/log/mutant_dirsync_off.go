//go:build !mutant_no_dirsync

package log

const noDirSync = false
