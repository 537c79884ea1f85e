//go:build !mutant_bodies

package log

// bodiesCount says that a large body which a full disk kept out counts as refused, so that news of room follow. The tag mutant_bodies takes the
// guard out, and the tests must notice.
const bodiesCount = true
