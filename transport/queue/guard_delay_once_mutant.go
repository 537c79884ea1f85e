//go:build mutant_delay_twice

package queue

const delayToldOnce = false
