package processes

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"posthouse/appliance"
)

// flip is one bit of one file of a data folder.
type flip struct {
	File string // within the folder
	Byte int64
	Bit  int
}

func (f flip) String() string { return fmt.Sprintf("%s byte %d bit %d", f.File, f.Byte, f.Bit) }

// class is the kind of file that a flip is in.
func (f flip) class() string {
	dir, base := filepath.Split(f.File)
	switch {
	case strings.HasPrefix(f.File, "log/"), strings.HasPrefix(f.File, "election/"):
		return filepath.Dir(f.File) + "/*" + filepath.Ext(base)
	case strings.HasPrefix(f.File, "view/"):
		return dir + "*" + filepath.Ext(base)
	}
	return f.File
}

// copySuffix marks the second copy of a small file.
const copySuffix = ".copy"

// written is how many bytes of a file were ever written: of what is reserved
// behind them, a flip shows nothing.
func written(b []byte) int64 { return int64(len(bytes.TrimRight(b, "\x00"))) }

// files lists what lies in a data folder, with its size; what was only reserved
// is not counted.
func files(t *testing.T, dir string) map[string]int64 {
	t.Helper()
	out := map[string]int64{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil || name == "view/ballast" {
			return err
		}
		b, err := os.ReadFile(path)
		if n := written(b); err == nil && n > 0 {
			out[name] = n
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// choose picks flips: half of them anywhere by size, the other half spread over
// all kinds of files, so that small ones are met too.
func choose(sizes map[string]int64, n int, random *rand.Rand) []flip {
	var names []string
	var total int64
	kinds := map[string][]string{}
	for name, size := range sizes {
		names = append(names, name)
		total += size
	}
	slices.Sort(names)
	for _, name := range names {
		k := flip{File: name}.class()
		kinds[k] = append(kinds[k], name)
	}
	var order []string
	for k := range kinds {
		order = append(order, k)
	}
	slices.Sort(order)
	var out []flip
	for i := range n {
		name := ""
		if i%2 == 0 {
			k := kinds[order[i/2%len(order)]]
			name = k[random.IntN(len(k))]
		} else {
			at := random.Int64N(total)
			for _, name = range names {
				if at -= sizes[name]; at < 0 {
					break
				}
			}
		}
		out = append(out, flip{name, random.Int64N(sizes[name]), random.IntN(8)})
	}
	return out
}

func (f flip) do(t *testing.T, dir string) {
	t.Helper()
	file, err := os.OpenFile(filepath.Join(dir, f.File), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	b := make([]byte, 1)
	if _, err := file.ReadAt(b, f.Byte); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1 << f.Bit
	if _, err := file.WriteAt(b, f.Byte); err != nil {
		t.Fatal(err)
	}
}

// verify runs `posthouse store verify` and returns what it names.
func verify(t *testing.T, bin, dir string) []appliance.Flaw {
	t.Helper()
	var out, errs bytes.Buffer
	c := exec.Command(bin, "store", "verify", "--json", "--data", dir)
	c.Stdout, c.Stderr = &out, &errs
	err := c.Run()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1) {
		t.Errorf("store verify: %v\n%s%s", err, out.Bytes(), errs.Bytes())
		return nil
	}
	v := JSON[appliance.Verified](t, out.String())
	if (len(v.Damage) > 0) != (err != nil) {
		t.Errorf("store verify names %d places and exits with %v", len(v.Damage), err)
	}
	return v.Damage
}

// TestAFlippedBitIsHarmlessOrNamed flips bits in a stopped node's files and
// starts the node on them: as people and peers see it, it has to be as before,
// or say where it is not.
func TestAFlippedBitIsHarmlessOrNamed(t *testing.T) {
	m := Up(t, "hq") // alone: nobody gives back what it loses
	sendWork(t, m)
	before := see(t, m, "hq")
	hq := m.Node("hq")
	// Some stop in order, some are killed: their files differ.
	stop := func(sig syscall.Signal) {
		pid := m.Node("hq").Pid
		if pid == 0 {
			return
		}
		syscall.Kill(pid, sig)
		m.WaitFor("hq ends", 30*time.Second, func() bool { return !running(pid) })
	}
	images := []string{hq.Data + ".killed", hq.Data + ".stopped"}
	// The second copy of the domain state follows within seconds.
	m.WaitFor("the domain state has its second copy", 20*time.Second, func() bool {
		_, err := os.Stat(filepath.Join(hq.Data, "election", "frozen"))
		return err == nil
	})
	stop(syscall.SIGKILL)
	run(t, "cp", "-a", hq.Data, images[0])
	m.Start("hq")
	stop(syscall.SIGTERM)
	run(t, "cp", "-a", hq.Data, images[1])

	random := rand.New(rand.NewPCG(7, 8))
	flips, each := Count(32, 1000), 4
	quiet, named, said, met := 0, 0, 0, map[string][3]int{}
	for round := range (flips + each - 1) / each {
		image := images[round%2]
		sizes := files(t, image)
		// Each start meets several flips where none hides another: one in the log,
		// the view or the election's files, the others in small files.
		parts := func(f flip) string {
			part := strings.TrimSuffix(strings.Split(f.File, "/")[0], copySuffix)
			if part == "log" || part == "view" || part == "election" {
				return "big"
			}
			return part
		}
		var fs []flip
		candidates := choose(sizes, 200, random)
		random.Shuffle(len(candidates), func(i, j int) { candidates[i], candidates[j] = candidates[j], candidates[i] })
		for _, f := range candidates {
			if len(fs) < each && !slices.ContainsFunc(fs, func(g flip) bool { return parts(f) == parts(g) }) {
				fs = append(fs, f)
			}
		}
		os.RemoveAll(hq.Data)
		run(t, "cp", "-a", image, hq.Data)
		clean := verify(t, m.bin, hq.Data)
		for _, f := range fs {
			f.do(t, hq.Data)
		}
		places := slices.DeleteFunc(verify(t, m.bin, hq.Data), func(x appliance.Flaw) bool { return slices.Contains(clean, x) })
		isNamed := map[flip]bool{}
		for _, f := range fs {
			isNamed[f] = slices.ContainsFunc(places, func(x appliance.Flaw) bool { return sameFile(x.File, f.File) })
		}
		// Start it, as a supervisor would: a second time if need be.
		if out, err := m.Command("demo", "start", "--dir", m.Dir, "hq"); err != nil {
			if again, err := m.Command("demo", "start", "--dir", m.Dir, "hq"); err != nil {
				out += again
				t.Errorf("with %v the node does not start: %v\n%s", fs, err, out)
				stop(syscall.SIGKILL)
				continue
			}
		}
		var words string
		ok := false
		var after office
		for end := time.Now().Add(12 * time.Second); !ok && time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
			after = office{}
			st, err := m.Status("hq")
			if err != nil {
				t.Errorf("with %v the node does not answer: %v", fs, err)
				break
			}
			b, _ := json.Marshal(st)
			words = string(b)
			after = seeQuietly(m, "hq")
			ok = cmp.Equal(before, after)
			if !ok && slices.ContainsFunc(fs, func(f flip) bool { return isNamed[f] && strings.HasPrefix(f.File, "log/") }) {
				break // it was named: the rest only has to be readable
			}
		}
		for _, f := range fs {
			c := met[f.class()]
			switch {
			case isNamed[f]:
				named++
				c[1]++
			case strings.Contains(words, filepath.Base(f.File)):
				said++
				c[2]++
			case ok:
				quiet++
				c[0]++
			default:
				t.Errorf("%v is not named, and the node differs (-before +after):\n%.3000s\nstatus: %.2000s", f, cmp.Diff(before, after), words)
			}
			met[f.class()] = c
		}
		if !ok && !slices.ContainsFunc(fs, func(f flip) bool { return strings.HasPrefix(f.File, "log/") }) {
			t.Errorf("with %v, none of them in the log, the node differs (-before +after):\n%.3000s", fs, cmp.Diff(before, after))
		}
		if d := wrongBodies(after); d != "" {
			t.Errorf("with %v: %s", fs, d)
		}
		stop(syscall.SIGKILL)
	}
	t.Logf("%d flips: %d harmless, %d named by store verify, %d by the status", quiet+named+said, quiet, named, said)
	var kinds []string
	for k := range met {
		kinds = append(kinds, k)
	}
	slices.Sort(kinds)
	for _, k := range kinds {
		t.Logf("%-40s %3d harmless %3d named %3d said", k, met[k][0], met[k][1], met[k][2])
	}
}

// sameFile reports whether a place named is in the file that was flipped; a
// body's record is named with the segment that holds it.
func sameFile(named, flipped string) bool { return named == flipped }

// wrongBodies names a message that differs and does not say so.
func wrongBodies(o office) string {
	for who, fs := range o.Folders {
		for _, f := range fs {
			for _, x := range f.Messages {
				if x.Err != nil || strings.HasPrefix(x.Subject, "Welcome") || x.Subject == "Hello from outside" {
					continue
				}
				if err := x.check(); err != nil {
					return fmt.Sprintf("%s, %s, UID %d: %v", who, f.Name, x.UID, err)
				}
			}
		}
	}
	return ""
}

// seeQuietly is see of a node that may not show everything.
func seeQuietly(m *Mesh, name string) office {
	out := office{Folders: map[string][]Folder{}, Outside: m.OutsideMail()}
	slices.Sort(out.Outside)
	for _, u := range m.State().Users {
		if u.Home == name {
			out.Folders[u.Address], _ = folders(m, u)
		}
	}
	out.Queue, _ = waiting(m, name)
	return out
}
