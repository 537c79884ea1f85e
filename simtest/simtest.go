// Package simtest runs whole nodes in virtual time over a simulated network and
// checks from outside what must hold. It also holds the tests of the house
// itself: who may import whom.
package simtest
