//go:build mutant_missed

package queue

const busyIsRoutedLater = false
