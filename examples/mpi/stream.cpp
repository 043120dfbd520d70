// Ranks draw disjoint parts of one stream of samples and write them where they belong: the file is the same for any number of ranks.
//
//     mpirun -n RANKS stream FLOW SAMPLES FILE
#include <mpi.h>

#include <cstdio>
#include <cstdlib>
#include <exception>

#include <fastmaf.hpp>

int main(int argc, char** argv) {
    MPI_Init(&argc, &argv);
    int rank = 0, ranks = 1, failed = 0;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    try {
        if (argc != 4) throw std::runtime_error("usage: stream FLOW SAMPLES FILE");
        const fastmaf::Model model(argv[1]);
        fastmaf::Evaluator flow(model);  // one thread for each rank
        const std::int64_t total = std::atoll(argv[2]), begin = total * rank / ranks, end = total * (rank + 1) / ranks;
        const std::vector<double> samples = flow.sample(end - begin, 1, fastmaf::none, std::uint64_t(begin));
        MPI_File file;
        if (MPI_File_open(MPI_COMM_WORLD, argv[3], MPI_MODE_CREATE | MPI_MODE_WRONLY, MPI_INFO_NULL, &file))
            throw std::runtime_error("cannot write");
        MPI_File_set_size(file, MPI_Offset(total * model.features() * 8));  // nothing is left of a longer one
        MPI_File_write_at_all(file, MPI_Offset(begin * model.features() * 8), samples.data(), int(samples.size()), MPI_DOUBLE,
                              MPI_STATUS_IGNORE);
        MPI_File_close(&file);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "rank %d: %s\n", rank, error.what());
        failed = 1;
        MPI_Abort(MPI_COMM_WORLD, 1);
    }
    MPI_Finalize();
    return failed;
}
