package login

import (
	"crypto/rand"
	"strings"
	"testing"

	"posthouse/mesh"
)

func TestOnlyTheRightPasswordFits(t *testing.T) {
	v, err := New("correct horse", rand.Reader)
	if err != nil || !strings.HasPrefix(v, "$argon2id$v=19$m=19456,t=2,p=1$") {
		t.Fatal(v, err)
	}
	c, err := NewChecker(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, verifier, password string
		version                  uint64
		want                     bool
	}{
		{"the right one", v, "correct horse", 1, true},
		{"the right one again, remembered", v, "correct horse", 1, true},
		{"a wrong one", v, "correct horsf", 1, false},
		{"an empty one", v, "", 1, false},
		{"one with a NUL", v, "correct horse\x00", 1, false},
		{"an unknown user", "", "correct horse", 1, false},
		{"the decoy's own key", decoy, "x", 1, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := c.Check(t.Context(), Credential{User: mesh.ID{1}, Version: tc.version}, tc.verifier, tc.password)
			if err != nil || got != tc.want {
				t.Errorf("got %v, %v", got, err)
			}
		})
	}
	if len(c.known) != 1 {
		t.Errorf("%d successes remembered, want 1", len(c.known))
	}
}

func TestABadVerifierIsAnErrorNotALogin(t *testing.T) {
	c, _ := NewChecker(rand.Reader)
	for _, v := range []string{"x", "$argon2id$v=19$m=99999999,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAA", "$argon2id$v=19$m=8,t=1,p=1$AAAAAAAAAAAAAAAAAAAAAA$"} {
		if ok, err := c.Check(t.Context(), Credential{}, v, "x"); ok || err == nil {
			t.Errorf("%q: %v, %v", v, ok, err)
		}
	}
}
