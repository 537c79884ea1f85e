//go:build !mutant_missed

package queue

// busyIsRoutedLater says that a leg which was being accepted, tried, or changed when homes changed is routed anew as soon as it is not. The tag
// mutant_missed takes the guard out, and the tests must notice.
const busyIsRoutedLater = true
